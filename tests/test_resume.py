"""A run that was stopped and resumed is the run that never stopped: the same weights, the same log, bit for bit."""

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.optimization import Schedule, make_optimizer
from modeling_nanogpt.training.averaging import Average
from modeling_nanogpt.training.checkpointing import (
    TrainState,
    list_checkpoints,
    newest_complete,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from modeling_nanogpt.training.starting import SHAPING, check_out_dir, check_same_run, superseded_by
from support.runs import RunHooks, read_windows
from support.texts import write_words
from support.tiny_run import TINY, train
from tokenization.arguments import DataArguments
from tokenization.windows import open_stream, training_windows
from train_accelerate import ModelArguments, RunArguments

# 14 steps. The log and the checkpoints are written after different steps, and each step draws dropout.
FLAGS = {"max_iters": 14, "lr_decay_iters": 14, "eval_interval": 7, "log_interval": 3, "save_interval": 4}
FLAGS |= {"dropout": 0.2, "keep_checkpoints": 9, "eval_tokens": 64}
KINDS = {
    "one micro-batch": {},
    "four micro-batches, no clipping": {"batch_size": 2, "gradient_accumulation_steps": 4, "grad_clip": 0},
}


def all_that_was_learned(run) -> dict:
    """The weights in out_dir, and the tensors of the last checkpoint under their paths."""

    def leaves(value, path):
        if isinstance(value, dict):
            return {key: leaf for name, each in value.items() for key, leaf in leaves(each, (*path, name)).items()}
        return {path: value} if isinstance(value, torch.Tensor) else {}

    tensors = torch.load(list_checkpoints(run.out_dir)[-1] / "training_state.pt", weights_only=True)
    return leaves({"out_dir": load_file(run.out_dir / "model.safetensors"), "checkpoint": tensors}, ())


def assert_same_run(run, expected):
    ours, theirs = all_that_was_learned(run), all_that_was_learned(expected)
    assert len(ours) > 20 and ours.keys() == theirs.keys()
    assert [path for path in ours if not torch.equal(ours[path], theirs[path])] == []
    assert without_speed(run.history) == without_speed(expected.history)


def without_speed(history):
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in history]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, prepared once for all runs below."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module", params=KINDS)
def unbroken(request, folder):
    """A run that nothing interrupts, and its flags."""
    flags = FLAGS | KINDS[request.param]
    run = train(folder, out_dir=folder / request.param, **flags)
    return SimpleNamespace(**vars(run), flags=flags)


@pytest.fixture(scope="module")
def finished(folder):
    """Such a run, which tests copy."""
    return train(folder, out_dir=folder / "finished", **FLAGS)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the out_dir of that run."""
    return shutil.copytree(finished.out_dir, tmp_path / "out")


def broken_off_after(step, out_dir):
    """Remove what a finished run wrote after a step, as if it had been killed then."""
    for checkpoint in list_checkpoints(out_dir):
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    for path in out_dir.iterdir():
        if path.is_file():
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The same run


def test_a_resumed_run_and_a_resume_of_it_are_the_run_bit_for_bit(unbroken, folder, tmp_path):
    out_dir = tmp_path / "out"
    train(folder, out_dir=out_dir, **unbroken.flags | {"max_iters": 5})
    train(folder, out_dir=out_dir, init_from="resume", **unbroken.flags | {"max_iters": 10})
    assert [path.name[-2:] for path in list_checkpoints(out_dir)] == ["04", "05", "08", "10"]
    again = train(folder, out_dir=out_dir, init_from="resume", **unbroken.flags)
    assert_same_run(again, unbroken)
    assert [entry["step"] for entry in again.history] == [0, 3, 6, 7, 9, 12, 14]


def test_the_learning_rate_goes_on_where_it_was(finished, copied, folder):
    broken_off_after(8, copied)
    resumed = train(folder, out_dir=copied, init_from="resume", **FLAGS)
    assert resumed.rates == [Schedule(1e-2, 1e-3, 2, 14)(step - 1) for step in (3, 6, 9, 12)]


def test_a_finished_run_that_is_resumed_stays_as_it_is(finished, copied, folder):
    again = train(folder, out_dir=copied, init_from="resume", **FLAGS)
    assert_same_run(again, finished)


def test_a_finished_run_may_be_made_longer(finished, copied, folder):
    flags = FLAGS | {"max_iters": 18}
    longer = train(folder, out_dir=copied, init_from="resume", **flags)
    assert [entry["step"] for entry in longer.history if "loss" in entry] == [3, 6, 9, 12, 15, 18]
    assert longer.losses[:4] == finished.losses


def test_a_run_from_a_named_checkpoint_removes_the_later_ones(finished, copied, folder):
    flags = FLAGS | {"init_from": copied / "checkpoints" / "step-00000008", "save_interval": 5}
    again = train(folder, out_dir=copied, **flags)
    assert [path.name[-2:] for path in list_checkpoints(copied)] == ["04", "08", "10", "14"]  # 12 is gone
    assert_same_run(again, finished)


def test_later_checkpoints_are_kept_until_the_first_new_one(finished, copied, folder):
    flags = FLAGS | {"init_from": copied / "checkpoints" / "step-00000004", "max_iters": 4}
    train(folder, out_dir=copied, **flags)
    assert [path.name[-2:] for path in list_checkpoints(copied)] == ["04", "08", "12", "14"]


def test_a_checkpoint_of_another_out_dir_begins_a_run_beside_it(finished, copied, folder, tmp_path):
    broken_off_after(8, copied)
    other = tmp_path / "other"
    again = train(folder, out_dir=other, init_from=copied / "checkpoints" / "step-00000008", **FLAGS)
    assert_same_run(again, finished)
    assert [path.name[-2:] for path in list_checkpoints(copied)] == ["04", "08"]
    assert [path.name[-2:] for path in list_checkpoints(other)] == ["12", "14"]


def test_a_step_may_be_cut_another_way_when_it_goes_on(folder, tmp_path):
    flags = FLAGS | {"dropout": 0.0}
    whole = train(folder, out_dir=tmp_path / "whole", **flags)
    train(folder, out_dir=tmp_path / "out", **flags | {"max_iters": 6})
    split = {"batch_size": 2, "gradient_accumulation_steps": 4, "init_from": "resume"}
    again = train(folder, out_dir=tmp_path / "out", **flags | split)
    assert again.losses == pytest.approx(whole.losses, abs=1e-5) and again.losses != whole.losses


def test_a_resumed_run_makes_out_dir_complete_again(finished, copied, folder):
    broken_off_after(8, copied)
    (copied / "checkpoints" / ".saving").mkdir()
    (copied / "checkpoints" / ".saving" / "training_state.pt").write_bytes(b"half")
    names = {path.name for path in train(folder, out_dir=copied, init_from="resume", **FLAGS).out_dir.iterdir()}
    assert names == {path.name for path in finished.out_dir.iterdir()}
    assert not (copied / "checkpoints" / ".saving").exists()


def test_run_yaml_of_a_resumed_run_repeats_the_whole_run(finished, copied, folder, monkeypatch):
    broken_off_after(8, copied)
    shape = ("n_layer", "n_head", "n_embd", "dropout", "block_size")  # the checkpoint knows
    monkeypatch.setattr("support.tiny_run.TINY", {key: value for key, value in TINY.items() if key not in shape})
    flags = {key: value for key, value in FLAGS.items() if key not in shape}
    again = train(folder, out_dir=copied, init_from="resume", **flags)
    assert_same_run(again, finished)
    written = (copied / "run.yaml").read_text().replace(str(copied), str(finished.out_dir))
    assert sorted(written.splitlines()) == sorted((finished.out_dir / "run.yaml").read_text().splitlines())


def test_a_run_from_a_model_with_a_vocabulary_of_its_own_goes_on(finished, folder, tmp_path):
    # GPT-2 has 50,257 tokens, and runs from scratch are padded to a multiple of 64
    shape = {"vocab_size": 300, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32}
    NanoGPTForCausalLM(NanoGPTConfig(**shape)).save_pretrained(tmp_path / "model")
    for path in finished.out_dir.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    flags = FLAGS | {"init_from": tmp_path / "model", "n_layer": 1}
    whole = train(folder, out_dir=tmp_path / "whole", **flags)
    train(folder, out_dir=tmp_path / "out", **flags | {"max_iters": 6})
    again = train(folder, out_dir=tmp_path / "out", **flags | {"init_from": "resume"})
    assert_same_run(again, whole)
    assert f"init_from: {tmp_path / 'model'}" in (tmp_path / "out" / "run.yaml").read_text()


def test_the_best_loss_survives_a_resume(folder, tmp_path):
    # a learning rate at which the first evaluation after the start is the best one
    flags = {"max_iters": 6, "eval_interval": 2, "decay_lr": "false", "warmup_iters": 0, "learning_rate": 0.1}
    flags |= {"always_save_checkpoint": "false", "grad_clip": 0, "save_interval": 3, "lr_decay_iters": 6}
    whole = train(folder, out_dir=tmp_path / "whole", **flags)
    train(folder, out_dir=tmp_path / "out", **flags | {"max_iters": 3})
    again = train(folder, out_dir=tmp_path / "out", init_from="resume", **flags)
    state, _ = read_checkpoint(newest_complete(again.out_dir))
    assert state.best_val_loss == min(whole.val_losses) == whole.val_losses[1]


def test_step_a_million_is_reached_at_once(finished, copied, folder, tmp_path):
    latest = newest_complete(copied)
    content = json.loads((latest / "state.json").read_text())
    content["train_state"]["step"] = 10**6
    (latest / "state.json").write_text(json.dumps(content))
    latest.rename(latest.with_name("step-01000000"))
    hooks = RunHooks()
    hooks.windows_log = os.open(tmp_path / "windows", os.O_WRONLY | os.O_CREAT)
    flags = FLAGS | {"max_iters": 10**6 + 2, "save_interval": 10**6}
    run = train(folder, hooks, out_dir=copied, init_from="resume", **flags)
    first, batches = read_windows(tmp_path / "windows")
    assert first == 10**6
    stream = open_stream(run.data_dir, "train")
    size = {
        "count": TINY["batch_size"] * TINY["gradient_accumulation_steps"],
        "block_size": TINY["block_size"],
        "order": "random",
        "seed": 1337,
    }
    expected = []
    for step in (10**6, 10**6 + 1):
        expected += training_windows(stream, step=step, **size).offsets.tolist()
    seen = [offset for batch in batches for offset in batch]
    assert seen[: len(expected)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that are not whole


@pytest.mark.parametrize("fault", ["truncated", "half removed", "no state", "state cut short", "tensors lost"])
def test_the_checkpoint_before_a_broken_one_is_taken(finished, copied, folder, fault, capsys):
    broken_off_after(12, copied)
    latest = newest_complete(copied)
    tensors, state = latest / "training_state.pt", latest / "state.json"
    assert latest.name == "step-00000012"
    if fault == "truncated":
        os.truncate(tensors, tensors.stat().st_size - 1)
    if fault == "half removed":
        state.unlink(), tensors.unlink()
    if fault == "no state":
        state.unlink()
    if fault == "state cut short":
        os.truncate(state, 100)
    if fault == "tensors lost":
        tensors.unlink()
    assert (taken := newest_complete(copied)).name == "step-00000008"
    again = train(folder, out_dir=copied, init_from="resume", **FLAGS)
    assert_same_run(again, finished)
    assert f"going on after step 8, from {taken}" in capsys.readouterr().out
    assert [path.name[-2:] for path in list_checkpoints(copied)] == ["04", "08", "12", "14"]


def refusal(folder, **flags):
    """The one line with which the trainer answers. It must write nothing."""
    before = {path: path.stat().st_mtime_ns for path in flags["out_dir"].rglob("*")}
    with pytest.raises(SystemExit) as stop:
        train(folder, **FLAGS | flags)
    assert {path: path.stat().st_mtime_ns for path in flags["out_dir"].rglob("*")} == before
    (line,) = stop.value.code.splitlines()
    return line


@pytest.mark.parametrize("init_from", ["resume", "checkpoints/step-00000004"])
def test_there_must_be_something_to_go_on_from(folder, tmp_path, init_from):
    line = refusal(folder, out_dir=tmp_path / "out", init_from=init_from)
    assert f"init_from={init_from}" in line and "complete checkpoint" in line


def test_a_named_checkpoint_that_is_not_complete_is_refused(folder, copied):
    named = copied / "checkpoints" / "step-00000008"
    (named / "state.json").unlink()
    assert f"{named} is not a complete checkpoint" in refusal(folder, out_dir=copied, init_from=named)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(folder, copied, tmp_path, protocol):
    latest = newest_complete(copied)
    if protocol == "torch":
        torch.save({"model": Payload(tmp_path / "run"), "optimizer": {}}, latest / "training_state.pt")
    else:
        (latest / "training_state.pt").write_bytes(pickle.dumps(Payload(tmp_path / "run")))
    content = json.loads((latest / "state.json").read_text())
    content["bytes"] = (latest / "training_state.pt").stat().st_size
    (latest / "state.json").write_text(json.dumps(content))
    line = refusal(folder, out_dir=copied, init_from="resume")
    assert "training_state.pt" in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_whose_bytes_are_lost_is_refused_in_one_line(folder, copied):
    path = newest_complete(copied) / "training_state.pt"
    path.write_bytes(b"\0" * path.stat().st_size)
    line = refusal(folder, out_dir=copied, init_from="resume")
    assert "training_state.pt is damaged" in line and "older" in line


# ---------------------------------------------------------------------------------------------------------------------
# Flags that a run cannot change on its way

OTHER = {"learning_rate": 2e-2, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.99, "grad_clip": 2.0, "seed": 7}
OTHER |= {
    "optimizer": "muon",
    "momentum": 0.9,
    "momentum_warmup_iters": 2,
    "momentum_cooldown_iters": 2,
    "muon_weight_decay": 0.3,
    "average_decay": 0.5,
    "lr_schedule": "linear",
    "decay_fraction": 0.3,
    "warmup_iters": 3,
    "lr_decay_iters": 20,
    "min_lr": 1e-4,
    "windows": "epoch",
}
# These flags may change: they do not shape a step, or they only name places. The shape of the model and the data are
# compared themselves.
FREE = {"init_from", "out_dir", "batch_size", "gradient_accumulation_steps", "max_iters"}
FREE |= {"eval_interval", "eval_tokens", "log_interval", "always_save_checkpoint", "save_interval", "keep_checkpoints"}
FREE |= {"patience"}
FREE |= {"max_nonfinite_steps", "report_to", "eval_only", "prepare_only"}
FREE |= {"decay_lr"}  # it only sets lr_schedule and warmup_iters
FREE |= {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"}
FREE |= {"dtype", "gradient_checkpointing", "auto_batch_size", "compile", "attn_implementation"}


def test_each_flag_is_either_free_or_compared():
    model, data, run = (
        {field.name for field in dataclasses.fields(each)} for each in (ModelArguments, DataArguments, RunArguments)
    )
    shape = {key for key in model if hasattr(NanoGPTConfig(), key)}
    assert set(SHAPING) == set(OTHER)
    assert not FREE & set(SHAPING)
    assert model == shape | {"init_from", "start_from", "revision"}
    assert run | {"init_from", "windows"} == FREE | set(SHAPING)  # a new flag belongs to one of the two
    assert {"corpus", "tokenizer", "vocab_size", "data_dir", "windows"} <= data  # the rest shows in the tokens


@pytest.mark.parametrize("key", OTHER)
def test_a_flag_that_shapes_the_run_cannot_change(folder, copied, key):
    broken_off_after(8, copied)
    line = refusal(folder, out_dir=copied, init_from="resume", **{key: OTHER[key]})
    (ours, theirs) = re.search(rf"error: {key}=(\S+), but .*step-00000008 was trained with (\S+):", line).groups()
    assert ours.lower() == str(OTHER[key]) != theirs and f"--{key}={theirs}" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layer", 3), ("n_head", 4), ("n_embd", 64), ("block_size", 8), ("dropout", 0.5), ("bias", "true")],
)
def test_the_shape_of_the_model_cannot_change(folder, copied, key, value):
    assert f"{key}=" in refusal(folder, out_dir=copied, init_from="resume", **{key: value})


def test_the_number_of_windows_in_a_step_cannot_change(folder, copied):
    line = refusal(folder, out_dir=copied, init_from="resume", batch_size=4)
    assert "batch_size * gradient_accumulation_steps is 4" in line and "trained with 8" in line


def test_the_text_cannot_change(folder, copied, tmp_path):
    text = write_words(tmp_path / "other.txt").read_text()
    (tmp_path / "other.txt").write_text(text[::-1])
    with pytest.raises(SystemExit) as stop:
        train(
            folder,
            **FLAGS,
            out_dir=copied,
            init_from="resume",
            corpus=tmp_path / "other.txt",
            data_dir=tmp_path / "data",
        )
    assert "data_dir=" in stop.value.code and "other data" in stop.value.code


def test_a_run_cannot_be_made_shorter_than_it_is(folder, copied):
    line = refusal(folder, out_dir=copied, init_from="resume", max_iters=13)
    assert "max_iters=13" in line and "14 steps" in line


def test_a_flag_that_the_checkpoint_does_not_know_is_a_contradiction(tmp_path):
    recipe = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_iters": 1}
    with pytest.raises(ValueError, match="new=1.*None"):
        check_same_run(tmp_path, 0, {"recipe": recipe}, recipe | {"new": 1}, ["new"])


# ---------------------------------------------------------------------------------------------------------------------
# A new run in the out_dir of an old one


def test_a_run_that_is_not_finished_is_not_overwritten(folder, copied):
    broken_off_after(8, copied)
    line = refusal(folder, out_dir=copied)
    assert "step 8 of 14" in line and "--init_from=resume" in line and "--out_dir" in line


def test_another_runs_checkpoint_does_not_overwrite_it_either(finished, folder, copied):
    broken_off_after(8, copied)
    line = refusal(folder, out_dir=copied, init_from=finished.out_dir / "checkpoints" / "step-00000004")
    assert "step 8 of 14" in line


def test_a_finished_run_may_be_run_anew(finished, copied, folder):
    flags = FLAGS | {"seed": 7, "save_interval": 10, "keep_checkpoints": 9}
    new = train(folder, out_dir=copied, **flags)
    assert new.losses != finished.losses
    assert [path.name[-2:] for path in list_checkpoints(copied)] == ["10", "14"]  # the old checkpoints are gone


@pytest.mark.parametrize("only", ["eval_only", "prepare_only"])
def test_an_unfinished_run_may_be_evaluated(folder, copied, only, capsys):
    broken_off_after(8, copied)
    train(folder, out_dir=copied, **FLAGS | {only: "true", "init_from": "resume"})
    assert ("step 8: " in capsys.readouterr().out) == (only == "eval_only")
    train(folder, out_dir=copied, **FLAGS | {only: "true"})
    assert [path.name[-2:] for path in list_checkpoints(copied)] == ["04", "08"]


# ---------------------------------------------------------------------------------------------------------------------
# The parts

RUN = {"recipe": {"max_iters": 100}, "config": {}, "data": {}}


def write_steps(out_dir, steps, keep=9, superseded=()):
    for step in steps:
        save_checkpoint(
            out_dir, TrainState(step), {"model": {}, "optimizer": {}}, RUN, keep=keep, superseded=list(superseded)
        )
    return [int(path.name[5:]) for path in list_checkpoints(out_dir)]


def test_a_train_state_comes_back_as_it_was(tmp_path):
    entry = {"step": 3, "loss": 0.1 + 0.2, "grad_norm": None, "skipped": 1}
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    for best in (math.inf, 1 / 3):
        state = TrainState(3, best, [entry], [1 / 7, None], 2, scaler)
        save_checkpoint(tmp_path, state, {"model": {}, "optimizer": {}}, RUN, keep=2, superseded=[])
        assert read_checkpoint(newest_complete(tmp_path)) == (state, RUN)


def test_the_newest_are_kept(tmp_path):
    assert write_steps(tmp_path, [10, 20, 30], keep=2) == [20, 30]
    assert write_steps(tmp_path, [40], keep=1) == [40]


def test_one_that_is_not_complete_does_not_count_as_kept(tmp_path):
    write_steps(tmp_path, [10, 20])
    (tmp_path / "checkpoints" / "step-00000020" / "state.json").unlink()
    assert write_steps(tmp_path, [30], keep=2) == [10, 30]


def test_superseded_ones_go_with_the_first_save_even_if_later(tmp_path):
    write_steps(tmp_path, [10, 20, 30])
    old = superseded_by(tmp_path, tmp_path / "checkpoints" / "step-00000010")
    assert [path.name for path in old] == ["step-00000020", "step-00000030"]
    assert write_steps(tmp_path, [15], superseded=old) == [10, 15]
    assert superseded_by(tmp_path, None) == list_checkpoints(tmp_path)


def test_the_step_after_99999999_is_the_newest(tmp_path):
    assert write_steps(tmp_path, [99_999_999, 100_000_000], keep=1) == [100_000_000]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no such list of mapped files here")
def test_a_run_does_not_hold_on_to_the_file_it_was_resumed_from(finished):
    model = NanoGPTForCausalLM.from_pretrained(finished.out_dir)
    optimizer = make_optimizer("adamw", model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    latest = newest_complete(finished.out_dir)
    restore(latest, read_checkpoint(latest)[0], model, optimizer, Average(model, 0), Accelerator(cpu=True))
    assert len(optimizer.state) == len(list(model.parameters()))
    assert str(latest) not in Path("/proc/self/maps").read_text()


def test_an_out_dir_without_checkpoints_holds_no_unfinished_run(tmp_path):
    check_out_dir(tmp_path, None, overwrites=True)
    write_steps(tmp_path, [99])
    with pytest.raises(ValueError, match="step 99 of 100"):
        check_out_dir(tmp_path, None, overwrites=True)
    check_out_dir(tmp_path, None, overwrites=False)
    check_out_dir(tmp_path, tmp_path / "checkpoints" / "step-00000099", overwrites=True)
    write_steps(tmp_path, [100])
    check_out_dir(tmp_path, None, overwrites=True)


# ---------------------------------------------------------------------------------------------------------------------
# init_from=auto: one command line for the first start and for all others


def test_auto_begins_goes_on_and_ends_under_one_command_line(tmp_path, capsys):
    def second_line():
        return capsys.readouterr().out.splitlines()[1]

    whole = train(tmp_path, max_iters=12, eval_interval=4, out_dir=tmp_path / "whole")
    capsys.readouterr()
    flags = {"max_iters": 12, "eval_interval": 4, "init_from": "auto"}
    for step in (0, 7, 12):  # stopped after 7 steps, finished, and over already
        hooks = RunHooks()
        hooks.at_steps[6].append((os.kill, (os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) if step == 0 else nullcontext():
            run = train(tmp_path, hooks, **flags)
        expected = f"going on after step {step}, from {tmp_path / 'out' / 'checkpoints' / f'step-{step:08d}'}"
        assert second_line() == (expected if step else "starting from scratch")
    assert run.val_losses == whole.val_losses
    assert (run.out_dir / "model.safetensors").read_bytes() == (whole.out_dir / "model.safetensors").read_bytes()
    assert yaml.safe_load((run.out_dir / "run.yaml").read_text())["init_from"] == "scratch"


def test_auto_begins_with_the_model_that_start_from_names(tmp_path, capsys):
    model = train(tmp_path, max_iters=4, out_dir=tmp_path / "model")
    capsys.readouterr()
    flags = {"max_iters": 4, "init_from": "auto", "start_from": model.out_dir, "out_dir": tmp_path / "tuned"}
    tuned = train(tmp_path, **flags)
    assert capsys.readouterr().out.splitlines()[1] == f"starting from {model.out_dir}"
    assert tuned.val_losses[0] == pytest.approx(model.val_losses[-1], abs=1e-5)
