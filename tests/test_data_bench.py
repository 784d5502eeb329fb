"""The bench of the data room measures what it says, and a checkout that is none is one line."""

import re

import pytest

from support.needs import needs_gpt2
from support.texts import TEXT, write_corpus
from tokenization import bench


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["bench", *map(str, flags)])
    bench.main()


@needs_gpt2
def test_the_table_has_a_figure_for_each_part(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus", [TEXT] * 4)
    run(monkeypatch, f"--corpus={corpus}", "--copies=4", "--repeats=1")
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"{re.escape(corpus)}, 4 times: [\d,]+ tokens \(ours\)$", first)
    figures = [line for line in lines if line.startswith("  ours")]
    assert len(figures) == 3 and all(re.search(r"\d \(\d.* to \d", line) for line in figures)


def test_a_folder_that_is_no_checkout_is_one_line(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus", ["a", "b"])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f"--corpus={corpus}", f"--nanogpt={tmp_path}")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--nanogpt={tmp_path} is no checkout of nanoGPT" in line
