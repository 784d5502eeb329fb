"""trackio and wandb, without a network: what they hold on disk afterwards is what the run has logged."""

import importlib.util
import json
import sqlite3

import pytest

from support.runs import finish, recipe_of, start


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A function: the folder of a run that reported to a tracker, and the run's log."""

    def track(name):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        folder = tmp_path_factory.mktemp(name)
        recipe = recipe_of(folder, out_dir=folder / "out", max_iters=6, eval_interval=3, report_to=name)
        (folder / "wandb").mkdir()
        places = {"TRACKIO_DIR": folder / "trackio", "WANDB_DIR": folder, "WANDB_MODE": "offline"}
        assert finish(start(recipe, folder / "log", environment=places)) == [0]
        assert "is left out" not in (folder / "log").read_text()
        lines = (folder / "out" / "history.jsonl").read_text().splitlines()
        return folder, [json.loads(line) for line in lines]

    return track


def test_trackio_holds_what_was_reported(tracked):
    folder, history = tracked("trackio")
    rows = sqlite3.connect(folder / "trackio" / "out.db").execute("select step, metrics from metrics order by id")
    held = [{"step": step} | json.loads(metrics) for step, metrics in rows]
    assert held == history
    ((config,),) = sqlite3.connect(folder / "trackio" / "out.db").execute("select config from configs")
    assert json.loads(config)["max_iters"] == 6


def test_wandb_holds_what_was_reported(tracked):
    folder, history = tracked("wandb")
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    held = path.read_bytes()  # messages of protobuf, in which each value is JSON
    losses = [entry["val_loss"] for entry in history if "val_loss" in entry]
    assert len(losses) == 3 and b"eval_train_loss" in held
    assert all(json.dumps(loss).encode() in held for loss in losses)
