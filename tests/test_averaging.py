"""The average of the weights: its numbers, and that a run evaluates and saves it while it trains the weights."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.training.averaging import Average
from modeling_nanogpt.training.checkpointing import list_checkpoints
from modeling_nanogpt.training.hooks import Hooks
from support.tiny_run import train

FLAGS = {"max_iters": 8, "lr_decay_iters": 8, "eval_interval": 4, "eval_tokens": 64, "dropout": 0.2}
FLAGS |= {"save_interval": 1, "keep_checkpoints": 9}
KNOBS = {"average_decay": 0.7, "momentum_warmup_iters": 3, "momentum_cooldown_iters": 3, "muon_weight_decay": 0.5}


def average_of(values: list, decay: float) -> np.ndarray:
    """The average of several steps in double precision: each step's weight, written out."""
    average = np.zeros(np.shape(values[0]))
    for step, value in enumerate(values):
        share = 1 / (step + 1) if 1 / (step + 1) > 1 - decay else 1 - decay
        average = (1 - share) * average + share * np.asarray(value, dtype=np.float64)
    return average


def tensors_of(checkpoint) -> dict:
    return torch.load(checkpoint / "training_state.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("averaging")


@pytest.fixture(scope="module")
def plain(folder):
    return train(folder, out_dir=folder / "plain", optimizer="adamw", **FLAGS)


@pytest.fixture(scope="module")
def averaged(folder):
    return train(folder, out_dir=folder / "averaged", optimizer="adamw", average_decay=0.7, **FLAGS)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_it_is_the_mean_at_first_and_then_forgets():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    average, values = Average(model, decay=0.75), []
    for step in range(9):
        with torch.no_grad():
            model.weight.normal_()
        values.append(model.weight.tolist())
        average.update(step, skip=torch.zeros(()))
        with average.in_model():
            found = model.weight.tolist()
            if step < 4:
                np.testing.assert_allclose(found, np.mean(values, axis=0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found, average_of(values, 0.75), rtol=1e-5, atol=1e-6)
        assert model.weight.tolist() == values[-1]  # the weights come back bit for bit


def test_a_skipped_step_leaves_the_average_as_it_is():
    model = torch.nn.Linear(2, 3)
    average = Average(model, decay=0.75)
    with torch.no_grad():
        model.weight.fill_(1)
        average.update(0, skip=torch.zeros(()))
        model.weight.fill_(2)
    average.update(1, skip=torch.ones(()))
    with average.in_model():
        assert torch.equal(model.weight, torch.ones(3, 2))


def test_the_weights_come_back_after_an_error():
    model = torch.nn.Linear(2, 3)
    average, before = Average(model, decay=0.75), model.weight.detach().clone()
    average.update(0, skip=torch.zeros(()))
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(KeyboardInterrupt), average.in_model():
        assert torch.equal(model.weight, before)
        raise KeyboardInterrupt
    assert torch.equal(model.weight, before + 1)


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def test_the_model_that_is_saved_is_the_average_of_the_weights_in_the_checkpoints(averaged):
    checkpoints = [tensors_of(path) for path in list_checkpoints(averaged.out_dir)]
    saved = load_file(averaged.out_dir / "model.safetensors")
    assert len(checkpoints) == 8
    for name, weight in saved.items():
        steps = [checkpoint["model"][name].tolist() for checkpoint in checkpoints]
        np.testing.assert_allclose(weight, average_of(steps, 0.7), atol=1e-6)
        assert torch.equal(weight, checkpoints[-1]["average"][name])


def test_training_does_not_know_of_the_average(averaged, plain):
    assert averaged.losses == plain.losses and averaged.val_losses[1:] != plain.val_losses[1:]
    ours, theirs = (tensors_of(list_checkpoints(run.out_dir)[-1])["model"] for run in (averaged, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "average" not in tensors_of(list_checkpoints(plain.out_dir)[-1])


def test_an_evaluation_evaluates_what_is_saved(averaged, folder, capsys):
    again = train(folder, out_dir=folder / "model", init_from=str(averaged.out_dir), eval_only=True, eval_tokens=64)
    assert again.history == []
    assert f"val loss {averaged.val_losses[-1]:.4f}" in capsys.readouterr().out
    train(folder, out_dir=averaged.out_dir, init_from="resume", eval_only=True, average_decay=0.7, **FLAGS)
    assert f"val loss {averaged.val_losses[-1]:.4f}" in capsys.readouterr().out


class StepCounter(Hooks):
    def before_step(self, step):
        self.step = step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_finite_gradient_leaves_the_average_alone(folder, tmp_path, monkeypatch, optimizer):
    forward, hooks = NanoGPTForCausalLM.forward, StepCounter()

    def spoiled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training and hooks.step == 5:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(NanoGPTForCausalLM, "forward", spoiled)
    run = train(folder, hooks, out_dir=tmp_path, optimizer=optimizer, average_decay=0.7, **FLAGS)
    before, after, later = (tensors_of(path)["average"] for path in list_checkpoints(run.out_dir)[4:7])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(after[name], later[name]) for name in before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_every_knob_resumes_bit_for_bit(folder, tmp_path, optimizer):
    flags = FLAGS | KNOBS | {"optimizer": optimizer}
    whole = train(folder, out_dir=tmp_path / "whole", **flags)
    resumed = tmp_path / "resumed"
    train(folder, out_dir=resumed, **flags | {"max_iters": 3})
    train(folder, out_dir=resumed, **flags | {"max_iters": 5}, init_from="resume")
    again = train(folder, out_dir=resumed, **flags, init_from="resume")
    assert again.losses == whole.losses and again.val_losses[-1] == whole.val_losses[-1]
    ours, theirs = (tensors_of(list_checkpoints(run.out_dir)[-1]) for run in (again, whole))
    for part in ("model", "average"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    ours, theirs = (load_file(run.out_dir / "model.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_a_version_without_these_flags_goes_on(plain, folder, tmp_path):
    out_dir = shutil.copytree(plain.out_dir, tmp_path / "out")
    for path in list_checkpoints(out_dir):
        text = (path / "state.json").read_text()
        for key, value in {"average_decay": "0.0", "muon_weight_decay": "0.1"}.items():
            assert text.count(f'"{key}": {value}, ') == 1
            text = text.replace(f'"{key}": {value}, ', "")
        for key in ("momentum_warmup_iters", "momentum_cooldown_iters"):
            text = text.replace(f'"{key}": 0, ', "")
        (path / "state.json").write_text(text)
    again = train(folder, out_dir=out_dir, init_from="resume", **FLAGS | {"max_iters": 9})
    assert len(again.losses) == 9
