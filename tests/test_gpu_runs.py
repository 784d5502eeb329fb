"""Whole runs on a GPU: what 16-bit arithmetic, its loss scaler and a full memory do to them."""

import math
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_accelerate
from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.training.checkpointing import list_checkpoints, newest_complete, read_checkpoint
from modeling_nanogpt.training.hooks import Hooks
from support import ROOT
from support.runs import recipe_of
from support.synchronizations import waits_in
from support.tiny_run import train

pytestmark = pytest.mark.gpu
LONG = {"max_iters": 200, "lr_decay_iters": 200, "eval_interval": 100, "warmup_iters": 20, "learning_rate": 3e-3}
# Large enough for a micro-batch to matter
WIDE = {"block_size": 512, "n_layer": 4, "n_head": 8, "n_embd": 512, "max_iters": 2, "eval_interval": 2}
WIDE |= {"eval_tokens": 512, "batch_size": 8, "gradient_accumulation_steps": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def float32_run(folder):
    return train(folder, out_dir=folder / "float32", dtype="float32", **LONG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_200_steps_of_16_bits_stay_close_to_float32(folder, tmp_path, monkeypatch, float32_run, dtype):
    run, theirs = train(folder, out_dir=tmp_path / "out", dtype=dtype, **LONG), float32_run
    if skipped := [entry["step"] for entry in run.history if entry.get("skipped")]:
        assert dtype == "float16" and len(skipped) < 10  # its scale was too high at first
        spoil_steps(monkeypatch, skipped)  # float32 must skip the same steps, to be at the same point afterwards
        theirs = train(folder, out_dir=tmp_path / "32", dtype="float32", **LONG)
    assert len(run.losses) == len(theirs.losses) == 200 - len(skipped)
    for first in range(20, len(run.losses) - 20, 20):  # a few steps at a time, because a single step is noisy
        means = [sum(each.losses[first : first + 20]) / 20 for each in (run, theirs)]
        assert means[0] == pytest.approx(means[1], abs=0.05)
    assert run.val_losses[-1] == pytest.approx(theirs.val_losses[-1], abs=0.03)


def test_float16_logs_its_scale_and_the_steps_it_skips(folder):
    run = train(folder, out_dir=folder / "scaled", dtype="float16", **LONG | {"max_iters": 40})
    entries = [entry for entry in run.history if "loss" in entry]
    assert all(entry["loss_scale"] > 0 for entry in entries)
    for before, entry in zip(entries, entries[1:], strict=False):
        if entry.get("skipped"):
            assert entry["loss"] is None and entry["loss_scale"] == before["loss_scale"] / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_goes_on_with_the_same_scale_and_losses(folder, tmp_path, dtype):
    flags = LONG | {"max_iters": 40, "save_interval": 40, "dropout": 0.2, "dtype": dtype}
    whole = train(folder, out_dir=tmp_path / "whole", **flags)
    train(folder, out_dir=tmp_path / "out", **flags | {"max_iters": 17})
    stopped, _ = read_checkpoint(newest_complete(tmp_path / "out"))
    again = train(folder, out_dir=tmp_path / "out", init_from="resume", **flags)
    losses = [[math.inf if loss is None else loss for loss in run.losses] for run in (again, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)
    states = [read_checkpoint(list_checkpoints(run.out_dir)[-1])[0] for run in (again, whole)]
    assert states[0].scaler == states[1].scaler
    assert bool(stopped.scaler) == (dtype == "float16")
    if dtype == "float16":
        assert stopped.scaler["_growth_tracker"] > 0 and stopped.scaler["scale"] > 0


def test_a_compiled_run_with_dropout_goes_on_with_the_same_losses(folder, tmp_path):
    flags = LONG | {"max_iters": 40, "save_interval": 40, "dropout": 0.2, "dtype": "bfloat16", "compile": True}
    whole = train(folder, out_dir=tmp_path / "whole", **flags)
    train(folder, out_dir=tmp_path / "out", **flags | {"max_iters": 17})
    again = train(folder, out_dir=tmp_path / "out", init_from="resume", **flags)
    assert again.losses == pytest.approx(whole.losses, abs=1e-2)


def spoil_steps(monkeypatch, steps: list[int]) -> None:
    """Let the losses of these steps, counted from 1, be nan."""
    forward = NanoGPTForCausalLM.forward
    calls = []

    def spoiled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if len(calls) in steps:
                output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(NanoGPTForCausalLM, "forward", spoiled)


def test_a_step_that_is_not_finite_changes_nothing(folder, tmp_path, monkeypatch, capsys):
    spoil_steps(monkeypatch, [6])
    flags = LONG | {"max_iters": 8, "save_interval": 1, "keep_checkpoints": 9, "dtype": "bfloat16"}
    run = train(folder, out_dir=tmp_path / "out", **flags)
    assert "step 6: the loss is not finite" in capsys.readouterr().out
    before, after = (
        torch.load(list_checkpoints(run.out_dir)[index] / "training_state.pt", weights_only=True)["model"]
        for index in (4, 5)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def small_memory(fraction: float) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(fraction)


@pytest.fixture
def two_gigabytes():
    """Limit the memory, as if the GPU had no more."""
    small_memory(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    small_memory(1.0)


def test_auto_batch_size_finds_one_that_fits_and_keeps_the_step(folder, tmp_path, two_gigabytes, capsys):
    flags = WIDE | {"batch_size": 512, "gradient_accumulation_steps": 1, "dtype": "bfloat16"}
    run = train(folder, out_dir=tmp_path / "out", auto_batch_size="true", **flags)
    found = re.search(r"a step: ([\d,]+) tokens in (\d+) micro-batches of (\d+) windows", capsys.readouterr().out)
    tokens, micro_batches, batch_size = (int(number.replace(",", "")) for number in found.groups())
    assert tokens == 512 * 512 and micro_batches * batch_size == 512 and 1 <= batch_size < 512
    by_hand = flags | {"batch_size": 1, "gradient_accumulation_steps": 512}
    assert run.losses == pytest.approx(train(folder, out_dir=tmp_path / "hand", **by_hand).losses, abs=1e-2)


class CountSynchronizations(Hooks):
    """Let CUDA warn if the host waits for the device between steps 5 and 15."""

    def before_step(self, step):
        if step in (5, 15):
            torch.cuda.set_sync_debug_mode("warn" if step == 5 else "default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(folder, tmp_path, optimizer):
    flags = {"max_iters": 20, "log_interval": 100, "eval_interval": 100, "dtype": "bfloat16", "optimizer": optimizer}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(folder, CountSynchronizations(), out_dir=tmp_path / "out", **flags)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits_in(caught) == []


def test_out_of_memory_is_one_line(folder, tmp_path, two_gigabytes):
    recipe = recipe_of(folder, out_dir=tmp_path / "out", **WIDE | {"batch_size": 1024, "dtype": "bfloat16"})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.raises(SystemExit) as stop:
        train_accelerate.run([str(recipe)])
    (line,) = stop.value.code.strip().splitlines()
    assert "out of memory at batch_size=1024" in line
    assert "--batch_size=512 --gradient_accumulation_steps=16" in line


@pytest.mark.parametrize(
    ("launched", "said"),
    [
        (["--mixed_precision=bf16"], "1 process (.*), bfloat16"),
        (["--mixed_precision=fp16"], "1 process (.*), float16"),
        (
            ["--config_file", ROOT / "hub_configs" / "accelerate" / "fsdp2.yaml"],
            r"1 process by FSDP2 \(.*\), bfloat16",
        ),
    ],
    ids=["bf16", "fp16", "fsdp2"],
)
def test_accelerate_launch_runs_on_one_gpu(folder, tmp_path, launched, said):
    recipe = recipe_of(folder, max_iters=3, out_dir=tmp_path / "out")
    command = [sys.executable, "-m", "accelerate.commands.launch", *launched, "--num_processes=1"]
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    for more in ([], ["--init_from=resume", "--max_iters=6", "--lr_decay_iters=3"]):
        trainer = [ROOT / "train_accelerate.py", recipe, *more]
        result = subprocess.run([*command, *trainer], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert re.search(said, result.stdout)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32} and "lm_head.weight" not in weights
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 30_000
