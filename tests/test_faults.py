"""What may go wrong while a run is under way: the disk, the numbers, the memory, a tracker, a signal.

Training goes on if it can. If not, one line says what to do, and the newest good checkpoint is there to go on from.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker, get_available_trackers, register_tracker_class
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.training.checkpointing import TENSORS, list_checkpoints, newest_complete
from modeling_nanogpt.training.fitting import explain_out_of_memory, largest_divisor
from support.forks import fork
from support.runs import RunHooks, at_step, finish, log_windows, recipe_of, send_itself, start
from support.tiny_run import TINY, train
from tokenization.windows import open_stream, training_windows

FLAGS = {"max_iters": 12, "lr_decay_iters": 12, "eval_interval": 4, "save_interval": 2, "eval_tokens": 64}
FLAGS |= {"dropout": 0.2, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def unbroken(folder):
    """The run to which nothing happens."""
    return train(folder, out_dir=folder / "unbroken", **FLAGS)


def assert_same_weights(out_dir, unbroken):
    ours, theirs = (load_file(each / "model.safetensors") for each in (out_dir, unbroken.out_dir))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def start_run(folder, out_dir, *flags, **options):
    """Start the run in a process of its own. Returns the process and the file with its output."""
    log = out_dir.with_suffix(".log")
    recipe = recipe_of(folder, **FLAGS)
    return start(recipe, log, f"--out_dir={out_dir}", *flags, **options), log


def lines_with(word, log):
    return [line for line in re.split(r"[\r\n]+", log.read_text()) if word in line]


# ---------------------------------------------------------------------------------------------------------------------
# The disk


@pytest.fixture
def disk(tmp_path):
    """A disk of 9 MB, which is more than the runs below need."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_no_training_and_spoils_nothing(disk, folder, unbroken):
    out_dir = disk / "out"
    subprocess.run(["mount", "-o", "remount,size=1200k", disk], check=True)  # room for two checkpoints and a model
    process, log = start_run(folder, out_dir, "--keep_checkpoints=9")
    assert finish(process) == [1]
    assert "step 12: train loss" in log.read_text()
    said = lines_with("could not be saved", log)
    assert said[0].startswith("the checkpoint could not be saved (") and said[0].endswith("the next save tries again")
    assert said[-1].startswith("train_accelerate.py: error: the checkpoint could not be saved")
    assert "Traceback" not in log.read_text() and "the model is in" not in log.read_text()
    assert not list(out_dir.rglob(".saving"))
    AutoModelForCausalLM.from_pretrained(out_dir)
    # with more room, the run goes on
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    process, _ = start_run(folder, out_dir, "--init_from=resume")
    assert finish(process) == [0]
    assert_same_weights(out_dir, unbroken)


def limit_file_size(size: int) -> None:
    """From now on, writing a file fails if the file grows beyond `size` bytes (-1: no limit)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("size", "lost"), [(10_000, "the model"), (200_000, "the checkpoint")])
def test_the_next_save_makes_up_for_one_that_failed(folder, tmp_path, unbroken, size, lost):
    # from step 2 to 6, the smaller limit is too small for the model, the larger one for a checkpoint
    before = ((at_step, 2, limit_file_size, size), (at_step, 6, limit_file_size, -1))
    process, log = start_run(folder, tmp_path / "out", before=before)
    assert finish(process) == [0]
    assert {line.split(" could not")[0] for line in lines_with("could not be saved", log)} >= {lost}
    assert all("File too large" in line for line in lines_with("could not be saved", log))
    assert lines_with("best val loss", log)
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["step-00000010", "step-00000012"]
    assert_same_weights(tmp_path / "out", unbroken)


@pytest.mark.parametrize("last", ["end", "signal"])
def test_a_run_whose_last_save_fails_exits_with_an_error(folder, tmp_path, last):
    before = ((at_step, 11, limit_file_size, 200_000),)
    if last == "signal":
        before += ((at_step, 11, send_itself, signal.SIGTERM),)
    process, log = start_run(folder, tmp_path / "out", before=before)
    assert finish(process) == [1]
    assert lines_with("train_accelerate.py: error: the checkpoint could not be saved", log)
    assert not lines_with("goes on from there", log) and not lines_with("best val loss", log)
    assert newest_complete(tmp_path / "out").name == "step-00000010"


def make_read_only(out_dir):
    """As when a disk has an error. A remount of the disk itself would fail, because the run keeps its lock open."""
    subprocess.run(["mount", "--bind", out_dir, out_dir], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", out_dir], check=True)


def make_writable(out_dir):
    subprocess.run(["umount", out_dir], check=True)


def test_a_disk_that_becomes_read_only_stops_no_training(disk, folder, unbroken):
    out_dir = disk / "out"
    recipe, log = recipe_of(folder, **FLAGS), folder / "read-only.log"
    before = ((at_step, 4, make_read_only, str(out_dir)), (at_step, 11, make_writable, str(out_dir)))
    assert finish(start(recipe, log, f"--out_dir={out_dir}", before=before)) == [0]
    assert len(lines_with("the checkpoint could not be saved (", log)) == 3  # after steps 6, 8 and 10
    assert len(lines_with("the model could not be saved (", log)) == 1
    assert_same_weights(out_dir, unbroken)


def test_a_disk_that_stays_read_only_keeps_the_last_good_state(disk, folder, unbroken):
    out_dir = disk / "out"
    recipe, log = recipe_of(folder, **FLAGS), folder / "read-only.log"
    before = ((at_step, 4, make_read_only, str(out_dir)),)
    assert finish(start(recipe, log, f"--out_dir={out_dir}", before=before)) == [1]
    assert lines_with("train_accelerate.py: error: ", log)
    assert newest_complete(out_dir).name == "step-00000004"
    AutoModelForCausalLM.from_pretrained(out_dir)
    make_writable(out_dir)
    assert finish(start(recipe, log, f"--out_dir={out_dir}", "--init_from=resume")) == [0]
    assert_same_weights(out_dir, unbroken)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.fixture
def spoil(monkeypatch):
    """Make what a training step computes NaN or inf, in the steps given. Returns the hooks for the run."""
    hooks = RunHooks()
    forward = NanoGPTForCausalLM.forward

    def spoiling(steps, how):
        def spoiled(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            if self.training and hooks.step in steps:
                if how == "loss":
                    output.loss = output.loss * float("nan")
                else:  # the loss is finite, but the gradient of the positions is not
                    output.loss.register_hook(lambda gradient: overflow(self.transformer.wpe.weight))
            return output

        def overflow(weight):
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient + float("inf"))[1])

        monkeypatch.setattr(NanoGPTForCausalLM, "forward", spoiled)
        return hooks

    return spoiling


def tensors_of(checkpoint):
    """All tensors in a checkpoint (weights, moments, counts of steps) under their paths."""

    def leaves(value, path):
        if isinstance(value, dict):
            return {key: leaf for name, each in value.items() for key, leaf in leaves(each, (*path, name)).items()}
        return {path: value} if isinstance(value, torch.Tensor) else {}

    return leaves(torch.load(checkpoint / TENSORS, weights_only=True), ())


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("grad_clip", [0, 1.0])
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(folder, tmp_path, spoil, capsys, how, grad_clip):
    hooks = spoil([5], how)
    flags = FLAGS | {"save_interval": 1, "keep_checkpoints": 99, "grad_clip": grad_clip, "log_interval": 3}
    run = train(folder, hooks, out_dir=tmp_path / "out", **flags)
    stream = open_stream(run.data_dir, "train")
    offsets = training_windows(stream, order="random", seed=1337, step=5, count=8, block_size=16).offsets
    where = f"(windows at tokens {', '.join(map(str, offsets))} of train)"
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert said == [f"step 6: the {how} is not finite, and its update is skipped {where}"]
    before, after, then = (tensors_of(folder) for folder in list_checkpoints(run.out_dir)[4:7])
    assert len(before) > 40 and all(torch.equal(before[path], after[path]) for path in before)
    assert not all(torch.equal(after[path], then[path]) for path in after)
    assert all(tensor.isfinite().all() for tensor in then.values())
    entries = {entry["step"]: entry for entry in run.history if "loss" in entry}
    assert {step: entry.get("skipped") for step, entry in entries.items()} == {3: None, 6: 1, 9: None, 12: None}
    assert "grad_norm" not in entries[6] and all(np.isfinite(run.losses)) and run.losses[-1] < run.losses[0]


def test_a_log_entry_may_hold_skipped_steps_alone(folder, tmp_path, spoil):
    hooks = spoil([4, 5, 6], "loss")
    run = train(folder, hooks, out_dir=tmp_path / "out", **FLAGS)
    assert len(run.losses) == run.history[-1]["step"] - 3 and (run.out_dir / "loss.png").exists()
    for line in (run.out_dir / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_run_that_only_skips_stops_with_its_last_good_checkpoint(folder, tmp_path, spoil, unbroken):
    hooks = spoil(range(4, 99), "loss")
    out_dir = tmp_path / "out"
    flags = FLAGS | {"max_nonfinite_steps": 3, "max_iters": 99, "lr_decay_iters": 12}
    with pytest.raises(SystemExit) as stop:
        train(folder, hooks, out_dir=out_dir, **flags)
    (line,) = stop.value.code.splitlines()  # Python prints it and exits with status 1
    assert "stopped after 3 such steps in a row" in line
    assert line.endswith(f"the last good checkpoint: {out_dir / 'checkpoints' / 'step-00000006'}")
    assert all(tensor.isfinite().all() for tensor in tensors_of(newest_complete(out_dir)).values())


def test_skipped_steps_count_only_in_a_row(folder, tmp_path, spoil):
    hooks = spoil([2, 3, 5, 6, 8, 9], "loss")
    run = train(folder, hooks, out_dir=tmp_path / "out", **FLAGS | {"max_nonfinite_steps": 3})
    assert sum(entry.get("skipped", 0) for entry in run.history) == 6


def test_steps_in_a_row_are_counted_across_a_resume(folder, tmp_path, spoil):
    hooks = spoil(range(4, 99), "loss")
    out_dir = tmp_path / "out"
    flags = FLAGS | {"max_nonfinite_steps": 4}
    train(folder, hooks, out_dir=out_dir, **flags | {"max_iters": 6})
    with pytest.raises(SystemExit, match="stopped after 4 such steps"):
        train(folder, hooks, out_dir=out_dir, **flags | {"init_from": "resume"})
    assert newest_complete(out_dir).name == "step-00000006"


# ---------------------------------------------------------------------------------------------------------------------
# The memory


def limit_memory(megabytes: int) -> None:
    """Allow this process so many more megabytes of memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


@needs_proc
def test_out_of_memory_is_one_line_that_says_what_to_do(folder, tmp_path):
    flags = ["--batch_size=4096", "--gradient_accumulation_steps=2", "--n_embd=128", "--eval_tokens=16"]
    process, log = start_run(folder, tmp_path / "out", *flags, before=((at_step, 0, limit_memory, 40),))
    assert finish(process) == [1]
    (line,) = lines_with("error", log)
    assert line.startswith("train_accelerate.py: error: out of memory at batch_size=4096: ")
    assert "--batch_size=2048 --gradient_accumulation_steps=4 keeps the same global batch" in line
    assert "--auto_batch_size=true" in line and "--gradient_checkpointing=true" in line
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("batch_size", "checkpointing", "said"),
    [
        (12, False, ["--batch_size=6 --gradient_accumulation_steps=10", "--gradient_checkpointing=true"]),
        (9, True, ["--batch_size=3 --gradient_accumulation_steps=15"]),
        (1, False, ["--gradient_checkpointing=true takes less"]),
        (1, True, ["--block_size", "FSDP2"]),
    ],
)
def test_what_helps_keeps_the_global_batch(batch_size, checkpointing, said):
    line = explain_out_of_memory(batch_size, 5, checkpointing)
    assert all(part in line for part in said) and line.count("gradient_checkpointing") == (not checkpointing)


def find_largest(path: str) -> None:
    """Try micro-batches that need 16 MB for each window, with 110 MB of memory."""
    limit_memory(110)
    tried = []

    def attempt(windows):
        tried.append(windows)
        torch.empty(windows * 2**20 * 16, dtype=torch.uint8).fill_(1)

    Path(path).write_text(json.dumps([largest_divisor(24, attempt), tried]))


@needs_proc
def test_the_largest_divisor_that_fits_is_found(tmp_path, folder):
    process = fork(find_largest, str(tmp_path / "found"))
    assert finish(process) == [0]
    assert json.loads((tmp_path / "found").read_text()) == [6, [24, 12, 8, 6]]


def test_an_error_that_is_not_about_memory_is_not_swallowed():
    def attempt(windows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_divisor(4, attempt)


def test_auto_batch_size_is_refused_on_a_cpu(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit, match="auto_batch_size needs a GPU"):
        train(folder, out_dir=tmp_path / "out", auto_batch_size="true", **FLAGS)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_saves(folder, tmp_path, unbroken, number, status, capfd):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    hooks = RunHooks()
    hooks.at_steps[4].append((send_itself, (number,)))
    with pytest.raises(SystemExit) as stop:
        train(folder, hooks, out_dir=tmp_path / "out", **FLAGS)
    assert stop.value.code == status
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    shown = capfd.readouterr()
    assert "stopped by a signal after step 5; --init_from=resume goes on from there" in shown.out
    assert f"{number.name}: saving after this step; again to quit at once" in shown.err
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "out")] == ["04", "05"]
    train(folder, out_dir=tmp_path / "out", init_from="resume", **FLAGS)
    assert_same_weights(tmp_path / "out", unbroken)


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(folder, tmp_path, capfd):
    hooks = RunHooks()
    hooks.at_evaluations[0].append((send_itself, (signal.SIGTERM,)))
    with pytest.raises(SystemExit) as stop:
        train(folder, hooks, out_dir=tmp_path / "out", **FLAGS)
    assert stop.value.code == 143 and "after step 0; nothing was trained yet" in capfd.readouterr().out
    assert newest_complete(tmp_path / "out") is None


@pytest.mark.parametrize("step", [4, 12])  # between two checkpoints, and after the last step
def test_a_signal_leaves_an_evaluation_and_the_resumed_run_evaluates_again(folder, tmp_path, unbroken, step, capfd):
    hooks, flags = RunHooks(), FLAGS | {"save_interval": 3, "log_interval": 3}
    hooks.at_evaluations[step].append((send_itself, (signal.SIGTERM,)))
    with pytest.raises(SystemExit) as stop:
        train(folder, hooks, out_dir=tmp_path / "out", **flags)
    assert stop.value.code == 143
    assert newest_complete(tmp_path / "out").name == f"step-{step:08d}"
    said = capfd.readouterr().out
    assert f"stopped by a signal after step {step}" in said and f"step {step}: train loss" not in said
    again = train(folder, out_dir=tmp_path / "out", init_from="resume", **flags)
    assert_same_weights(tmp_path / "out", unbroken)
    assert again.val_losses == unbroken.val_losses
    losses = {entry["step"]: entry["loss"] for entry in again.history if "loss" in entry}
    whole = [entry["loss"] for entry in unbroken.history if "loss" in entry]
    expected = {end: sum(whole[end - 3 : end]) / 3 for end in range(3, len(whole) + 1, 3)}
    assert losses == pytest.approx(expected)


def test_sigusr1_saves_and_goes_on(folder, tmp_path, unbroken):
    hooks = RunHooks()
    hooks.at_steps[4].append((send_itself, (signal.SIGUSR1,)))
    run = train(folder, hooks, out_dir=tmp_path / "out", **FLAGS | {"keep_checkpoints": 9})
    assert [path.name[-2:] for path in list_checkpoints(run.out_dir)] == ["02", "04", "05", "06", "08", "10", "12"]
    assert_same_weights(run.out_dir, unbroken)


def two_signals(pause: float) -> None:
    """SIGTERM twice, during a step that takes longer than anybody waits."""
    send_itself(signal.SIGTERM)
    time.sleep(pause)
    send_itself(signal.SIGTERM)


def test_a_second_signal_quits_at_once(folder, tmp_path, unbroken):
    process, log = start_run(folder, tmp_path / "out", before=((at_step, 5, two_signals, 1.1),))
    assert finish(process) == [143]
    assert lines_with("SIGTERM: saving after this step", log) and not lines_with("stopped by a signal", log)
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "out")] == ["02", "04"]
    process, _ = start_run(folder, tmp_path / "out", "--init_from=resume")
    assert finish(process) == [0]
    assert_same_weights(tmp_path / "out", unbroken)


def test_a_signal_that_a_launcher_passes_on_does_not_count_as_a_second_one(folder, tmp_path):
    process, log = start_run(folder, tmp_path / "out", before=((at_step, 5, two_signals, 0.1),))
    assert finish(process) == [143]
    assert lines_with("stopped by a signal after step 6", log)


def test_a_signal_while_printing_does_no_harm(folder, tmp_path):
    windows = tmp_path / "windows"
    process, log = start_run(folder, tmp_path / "out", "--max_iters=4000", before=((log_windows, str(windows)),))
    while not windows.exists() or windows.read_text().count("\n") < 5:
        assert process.exitcode is None
        time.sleep(0.01)
    for _ in range(200):  # each saves
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == [143]
    assert "Traceback" not in log.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


@pytest.fixture
def recorder():
    """A tracker for the tests: it remembers what it gets, and can fail in any of its methods."""

    class Recorder(GeneralTracker):
        name = "recorder"
        requires_logging_directory = False
        fails_in, calls = None, []

        def __init__(self, project, **kwargs):
            super().__init__()
            self.call("init", project)

        def call(self, name, *content):
            self.calls.append((name, *content))
            if name == self.fails_in:
                raise ConnectionError("the server is gone\nfor good")

        @property
        def tracker(self):
            return None

        def start(self):
            self.call("start")

        def store_init_configuration(self, values):
            self.call("store_init_configuration", values)

        def log(self, values, step):
            self.call("log", values, step)

        def finish(self):
            self.call("finish")

    register_tracker_class(Recorder)
    yield Recorder
    del tracking.LOGGER_TYPE_TO_CLASS["recorder"]


def test_a_tracker_gets_the_recipe_and_each_entry(folder, tmp_path, recorder):
    run = train(folder, out_dir=tmp_path / "out", report_to="recorder", **FLAGS)
    names = [call[0] for call in recorder.calls]
    assert names[:3] == ["init", "start", "store_init_configuration"] and names[-1] == "finish"
    assert names.count("log") == len(run.history) == len(names) - 4
    assert recorder.calls[0][1] == "out" and recorder.calls[2][1]["learning_rate"] == TINY["learning_rate"]
    logged = [{"step": step} | values for name, *rest in recorder.calls if name == "log" for values, step in [rest]]
    assert logged == run.history


@pytest.mark.parametrize("part", ["init", "start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_stops_nothing(folder, tmp_path, unbroken, recorder, capsys, part):
    recorder.fails_in = part
    train(folder, out_dir=tmp_path / "out", report_to="recorder", **FLAGS)
    said = [line for line in capsys.readouterr().err.splitlines() if "recorder" in line]
    assert said == ["report_to=recorder failed, and is left out from here on: the server is gone"]
    assert [call[0] for call in recorder.calls].count(part) == 1
    assert_same_weights(tmp_path / "out", unbroken)


def test_one_of_several_trackers_may_fail(folder, tmp_path, recorder):
    pytest.importorskip("tensorboard")
    recorder.fails_in = "log"
    run = train(folder, out_dir=tmp_path / "out", report_to="recorder, tensorboard", **FLAGS)
    assert scalars_of(run.out_dir)["val_loss"] == pytest.approx(dict(zip([0, 4, 8, 12], run.val_losses, strict=True)))


def scalars_of(out_dir):
    """What tensorboard reads in the folder of a run: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in {path.parent for path in (out_dir / "runs").rglob("*tfevents*")}:
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def test_tensorboard_reads_what_was_reported(folder, tmp_path):
    pytest.importorskip("tensorboard")
    run = train(folder, out_dir=tmp_path / "out", report_to="tensorboard", **FLAGS)
    scalars = scalars_of(run.out_dir)
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "val_loss", "eval_train_loss"} <= scalars.keys()
    steps = range(1, 13)
    assert scalars["loss"] == pytest.approx(dict(zip(steps, run.losses, strict=True)), abs=1e-6)
    assert scalars["lr"] == pytest.approx(dict(zip(steps, run.rates, strict=True)), rel=1e-6)


def test_nothing_is_reported_unless_asked_for(unbroken):
    assert not (unbroken.out_dir / "runs").exists() and (unbroken.out_dir / "history.jsonl").exists()


def test_an_unknown_tracker_is_refused(folder, tmp_path):
    with pytest.raises(
        SystemExit, match="report_to=tensorbored, but it must be none, or trackers out of .*wandb"
    ) as stop:
        train(folder, out_dir=tmp_path / "out", report_to="tensorbored", **FLAGS)
    assert "\n" not in stop.value.code and not (tmp_path / "out").exists()


@pytest.mark.skipif("tensorboard" in get_available_trackers(), reason="tensorboard is installed")
def test_tensorboard_that_is_not_installed_names_the_package(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"not installed: pip install tensorboard, or leave it out") as stop:
        train(folder, out_dir=tmp_path / "out", report_to="tensorboard", **FLAGS)
    assert "\n" not in stop.value.code and not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_installed_is_refused(folder, tmp_path):
    missing = [name for name in ("wandb", "trackio", "mlflow", "aim") if name not in get_available_trackers()]
    if not missing:
        pytest.skip("all of them are installed")
    name = missing[0]
    with pytest.raises(SystemExit, match=f"report_to={name}, but {name} is not installed: .*--report_to") as stop:
        train(folder, out_dir=tmp_path / "out", report_to=missing[0], **FLAGS)
    assert "\n" not in stop.value.code and not (tmp_path / "out").exists()
