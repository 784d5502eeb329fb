"""The bench of the data room measures what it says, and a checkout that is none is one line."""

import re
import subprocess
import sys

from support import ROOT
from support.needs import needs_gpt2
from support.texts import TEXT, write_corpus


def run(*flags):
    command = [sys.executable, ROOT / "docs" / "data_bench.py", *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", timeout=300)


@needs_gpt2
def test_the_table_has_a_figure_for_each_part(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [TEXT] * 4)
    done = run(f"--corpus={corpus}", "--copies=4", "--repeats=1")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert re.match(rf"{re.escape(corpus)}, 4 times: [\d,]+ tokens \(ours\)$", first)
    figures = [line for line in lines if line.startswith("  ours")]
    assert len(figures) == 3 and all(re.search(r"\d \(\d.* to \d", line) for line in figures)


def test_a_folder_that_is_no_checkout_is_one_line(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["a", "b"])
    done = run(f"--corpus={corpus}", f"--nanogpt={tmp_path}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"--nanogpt={tmp_path} is no checkout of nanoGPT" in line
