"""The table and the picture of several runs, from logs that are written here and from a run's own."""

import json

import pytest

from support.commands import command

MODULE = "modeling_nanogpt.compare"


def write_run(folder, history, batch_size=4):
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (folder / "run.yaml").write_text(f"batch_size: {batch_size}\ngradient_accumulation_steps: 2\n")
    (folder / "config.json").write_text(json.dumps({"block_size": 10}))
    return folder


@pytest.fixture
def slow(tmp_path):
    """A step is 80 tokens. The first ten steps take a second each, the next ten two seconds each."""
    history = [
        {"step": 0, "eval_train_loss": 5.0, "val_loss": 5.0},
        {"step": 10, "loss": 4.0, "tokens_per_second": 80.0},
        {"step": 10, "eval_train_loss": 3.0, "val_loss": 3.0},
        {"step": 20, "loss": 2.5, "tokens_per_second": 40.0},
        {"step": 20, "eval_train_loss": 2.0, "val_loss": 2.0},
        {"step": 30, "tokens_per_second": 80.0},
        {"step": 30, "eval_train_loss": None, "val_loss": None},
    ]
    return write_run(tmp_path / "slow", history)


@pytest.fixture
def young(tmp_path):
    """A run that has evaluated once, and has logged no step."""
    return write_run(tmp_path / "young", [{"step": 0, "eval_train_loss": 5.0, "val_loss": 5.0}], batch_size=8)


def rows_of(folder, *argv):
    status, said = command(folder, MODULE, *argv, "--json", "--plot", folder / "picture.png")
    assert status == 0, said
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    return json.loads("\n".join(said))


def test_the_table_has_what_the_logs_say(slow, young, tmp_path):
    first, second = rows_of(tmp_path, slow, young, "--loss=2.6")
    assert first == {
        "run": "slow",
        "steps": 20,
        "tokens": 1600,
        "seconds": 30.0,
        "best val loss": 2.0,
        "at step": 20,
        "steps to 2.6": pytest.approx(14),
        "seconds to 2.6": pytest.approx(18),
    }
    assert (second["steps"], second["seconds"], second["steps to 2.6"]) == (0, None, None)


def test_a_run_is_compared_with_itself_under_its_whole_path(run, tmp_path):
    again = tmp_path / "out"
    again.symlink_to(run.out_dir)
    status, said = command(tmp_path, MODULE, run.out_dir, again, "--plot", tmp_path / "picture.svg")
    assert status == 0 and (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert said[0].split()[:4] == ["run", "steps", "tokens", "seconds"]
    assert said[1].startswith(str(run.out_dir)) and said[2].startswith(str(again))
    assert f"{min(run.val_losses):.4f}" in said[1] and f"{20 * 8 * 16:,}" in said[1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("history.jsonl", None, "history.jsonl cannot be read"),
        ("history.jsonl", "", "holds no loss yet"),
        ("history.jsonl", "{", "is not what a run writes"),
        ("run.yaml", "batch_size: 3\n", "is not what a run writes"),
        ("config.json", "[]", "is not what a run writes"),
    ],
)
def test_a_folder_that_is_no_run_is_named_and_nothing_is_drawn(slow, name, content, said, tmp_path):
    (slow / name).unlink()
    if content is not None:
        (slow / name).write_text(content)
    status, lines = command(tmp_path, MODULE, slow, "--plot", tmp_path / "picture.png")
    assert status == 2 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "picture.png").exists()
