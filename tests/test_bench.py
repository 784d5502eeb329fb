"""The bench: its peers have the losses of ours, its table has a row for each, and its mistakes are one line."""

import json
import os
import subprocess
import sys

import pytest

from support import PATIENCE, ROOT
from support.needs import needs_time
from support.texts import TEXT, write_corpus


def run_bench(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "modeling_nanogpt.bench", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )


@needs_time
def test_training_is_timed_beside_loops_that_have_its_losses(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [TEXT] * 4)
    recipe = tmp_path / "recipe.yaml"
    shape = "n_layer: 2\nn_head: 2\nn_embd: 32\nblock_size: 16\ndropout: 0.1\nalways_save_checkpoint: false\n"
    recipe.write_text(f"corpus: {corpus}\n{shape}batch_size: 4\ngradient_accumulation_steps: 2\nwarmup_iters: 5\n")
    flags = ["--json", "--steps=40", "--rounds=1", "--flags=--dtype=bfloat16"]
    flags += ["--also=--log_interval=10 --dtype=float32"]
    done = run_bench("train", recipe, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = report["milliseconds a step"]
    assert list(rows) == [
        "ours",
        "ours --log_interval=10 --dtype=float32",
        "bare loop over our model",
        "bare loop over GPT2LMHeadModel",
    ]
    assert all(0 < time < 10_000 for (time,) in rows.values())
    apart = report["nats apart in the check"]
    assert apart["bare loop"] < 1e-5 and apart["GPT2LMHeadModel"] < 1e-5
    # one bare loop has this attention as well
    assert "bfloat16, plain attention" in report["ours ran as"] and "CPU" in report["machine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "recipe.yaml"]


@needs_time
def test_sampling_is_timed_with_and_without_its_start_up(run, tmp_path):
    done = run_bench("sample", run.out_dir, "--rounds=1", "--max_new_tokens=20", "--also=--stride 1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines == ["ours", "ours, start-up", "ours --stride 1", "ours"]
    assert "seconds without start-up" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (["sample", "missing"], "missing"),
        (["train", "muon.yaml"], "--optimizer=adamw"),
        (["train", "recipe.yaml", "--nanogpt=."], "--nanogpt=. is not a checkout of nanoGPT: it has no train.py"),
        (["train", "recipe.yaml", "--steps=3"], "--steps=3, but it must be at least 40"),
        (["race", "recipe.yaml"], "race"),
        (["train"], "RECIPE"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(tmp_path, arguments, said):
    corpus = write_corpus(tmp_path / "corpus", [TEXT] * 4)
    shape = f"corpus: {corpus}\nn_layer: 1\nn_head: 2\nn_embd: 32\nblock_size: 16\nbatch_size: 2\n"
    (tmp_path / "recipe.yaml").write_text(shape)
    (tmp_path / "muon.yaml").write_text(shape + "optimizer: muon\ngradient_accumulation_steps: 1\n")
    done = run_bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m modeling_nanogpt.bench: error: ") and said in line
