"""The loop: what it trains on, what it computes, and what it leaves in out_dir."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanogpt import NanoGPTForCausalLM, muon
from modeling_nanogpt.optimization import Schedule
from modeling_nanogpt.training.checkpointing import newest_complete, read_tensors
from support import ROOT
from support.runs import finish, start_together
from support.texts import write_words
from support.tiny_run import TINY, train, write_recipe
from tokenization.windows import open_stream, training_windows


def test_out_dir_is_a_whole_model_repository(run):
    assert {path.name for path in run.out_dir.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "configuration_nanogpt.py",
        "modeling_nanogpt.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "loss.png",
        "run.yaml",
        "history.jsonl",
        "samples.jsonl",
        "checkpoints",
        ".lock",  # empty; no upload takes hidden files
    }


def test_training_learns(run):
    assert run.losses[0] > 5 and run.losses[-1] < 3
    assert run.val_losses[-1] < 3 < run.val_losses[0]


def test_max_iters_counts_optimizer_updates_and_each_has_its_learning_rate(run):
    assert [entry["step"] for entry in run.history if "loss" in entry] == list(range(1, 21))
    assert [entry["step"] for entry in run.history if "val_loss" in entry] == [0, 10, 20]
    expected = [Schedule(1e-2, 1e-3, 2, 20)(step) for step in range(20)]
    assert run.rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lr_schedule": "linear", "min_lr": 0}, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_schedule": "wsd", "min_lr": 0, "decay_fraction": 0.5}, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
        ({"lr_schedule": "constant"}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"decay_lr": "false"}, [1, 1, 1, 1, 1, 1]),  # nanoGPT's constant rate has no warmup
    ],
)
def test_the_schedule_is_the_flags(tmp_path, flags, expected):
    run = train(tmp_path, max_iters=6, eval_tokens=64, **flags)
    assert run.rates == pytest.approx([1e-2 * part for part in expected], rel=1e-12)


def test_muon_accumulates_as_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "arithmetic_dtype", lambda device: torch.float32)  # bfloat16 rounds too much
    whole = train(tmp_path, optimizer="muon", max_iters=6)
    split = train(tmp_path, optimizer="muon", max_iters=6, batch_size=2, gradient_accumulation_steps=4)
    assert split.losses == pytest.approx(whole.losses, abs=1e-4)
    assert whole.losses != train(tmp_path, max_iters=6).losses


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("beta1", 0.5),
        ("momentum", 0.5),
        ("momentum_warmup_iters", 3),
        ("momentum_cooldown_iters", 3),
        ("muon_weight_decay", 0.5),
    ],
)
def test_a_flag_changes_a_run_with_muon(tmp_path, knob, value):
    flags = {"optimizer": "muon", "max_iters": 3}
    assert train(tmp_path, **flags).losses != train(tmp_path, **flags, **{knob: value}).losses


def test_the_last_evaluation_is_always_there(tmp_path):
    run = train(tmp_path, max_iters=7, eval_interval=5)
    assert [entry["step"] for entry in run.history if "val_loss" in entry] == [0, 5, 7]


def test_run_yaml_repeats_the_run_bit_for_bit(run, tmp_path):
    recipe = (run.out_dir / "run.yaml").read_text().replace(str(run.out_dir), str(tmp_path / "again"))
    (tmp_path / "run.yaml").write_text(recipe)
    command = [sys.executable, ROOT / "train_accelerate.py", tmp_path / "run.yaml"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    again = [json.loads(line) for line in (tmp_path / "again" / "history.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in again if "loss" in entry] == run.losses
    first, second = (load_file(folder / "model.safetensors") for folder in (run.out_dir, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_is_another_run(run, tmp_path):
    assert train(tmp_path, seed=7).losses[0] != run.losses[0]


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(2, 4), (1, 8)])
def test_accumulated_micro_batches_equal_one_batch(run, tmp_path, batch_size, micro_batches):
    split = train(tmp_path, batch_size=batch_size, gradient_accumulation_steps=micro_batches)
    assert split.losses == pytest.approx(run.losses, abs=1e-5)


def test_windows_that_begin_with_documents_are_trained_on(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(9):
        write_words(tmp_path / "texts" / f"{i}.txt")
    run = train(tmp_path, corpus=tmp_path / "texts", windows="documents", max_iters=4, eval_interval=4)
    assert len(run.losses) == 4 and run.losses[-1] < run.losses[0]


def test_every_target_of_a_step_counts_the_same_however_short_its_window(tmp_path):
    # The gradient of a step over two epochs, a short window in each, beside one gradient of all windows in float64.
    # After its first step, AdamW's mean of gradients is 1 - beta1 of the gradient, and the checkpoint holds it.
    flags = {"windows": "epoch", "max_iters": 1, "eval_interval": 1, "grad_clip": 0, "decay_lr": False}
    flags |= {"dtype": "float32", "beta1": 0.9, "block_size": 101, "dropout": 0.0}
    run = train(tmp_path, **flags, batch_size=3, gradient_accumulation_steps=36)
    stream = open_stream(run.data_dir, "train")
    windows = training_windows(stream, order="epoch", seed=1337, step=0, count=108, block_size=101)
    offsets, lengths = windows.offsets, windows.lengths
    assert sorted(lengths.tolist())[:3] == [47, 47, 101]
    trained = AutoModelForCausalLM.from_pretrained(run.out_dir)
    set_seed(1337)
    model = NanoGPTForCausalLM(trained.config)
    model.double()
    ids = torch.from_numpy(stream.windows(offsets, lengths, 101))
    logits = model(ids[:, :-1].clamp(min=0)).logits.transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="sum") / lengths.sum()
    assert loss.item() == pytest.approx(run.losses[0], abs=1e-5)
    loss.backward()
    optimizer_state = read_tensors(newest_complete(run.out_dir), mapped=False)["optimizer"]["state"]
    for name, weight in model.named_parameters():
        gradient = optimizer_state[name]["exp_avg"] / (1 - 0.9)
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-3, atol=1e-6)


def test_two_processes_train_on_the_same_windows(tmp_path):
    one = train(tmp_path, gradient_accumulation_steps=4, batch_size=2)
    flags = TINY | {"gradient_accumulation_steps": 4, "batch_size": 2, "out_dir": tmp_path / "two"}
    recipe = write_recipe(tmp_path / "two.yaml", corpus=tmp_path / "corpus.txt", data_dir=tmp_path / "data", **flags)
    running = start_together(2, recipe, tmp_path / "log")
    assert finish(*running) == [0, 0], (tmp_path / "log.0").read_text()
    said = "".join((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert "2 processes by DDP (cpu, 1 thread each), float32" in said
    assert said.count("step 20: train") == said.count("step 20: sample") == 1  # only one process prints
    history = [json.loads(line) for line in (tmp_path / "two" / "history.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(one.losses, abs=1e-5)
    assert [entry["lr"] for entry in history if "lr" in entry] == one.rates
    assert [e["val_loss"] for e in history if "val_loss" in e] == pytest.approx(one.val_losses, abs=1e-5)


def test_accelerate_launch_runs_the_command_of_the_readme(tmp_path):
    recipe = write_recipe(
        tmp_path / "tiny.yaml", corpus=write_words(tmp_path / "corpus.txt"), **TINY | {"max_iters": 3}
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1"]
    command = [*launch, ROOT / "train_accelerate.py", recipe, "--max_iters=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 2: " in result.stdout and "step 3: " not in result.stdout  # the command line wins
    assert (tmp_path / "out" / "tiny" / "model.safetensors").exists()
    assert (tmp_path / "data" / "tiny" / "prepared.json").exists()


def whole_split_loss(run, split: str) -> float:
    """Mean loss over all targets of a split, in windows that follow each other, one at a time, in float64."""
    model = AutoModelForCausalLM.from_pretrained(run.out_dir, trust_remote_code=False).double().eval()
    stream = open_stream(run.data_dir, split)
    rest = len(stream) - 1
    ids = torch.from_numpy(stream.windows(np.array([0]), np.array([rest]), rest)[0])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, TINY["block_size"]):
            window = ids[start : start + TINY["block_size"] + 1]
            logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def test_val_loss_is_that_of_the_whole_split(run):
    assert run.val_losses[-1] == pytest.approx(whole_split_loss(run, "val"), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_does_not_depend_on_the_batch_size(run, tmp_path, batch_size, capsys):
    train(
        tmp_path,
        init_from=run.out_dir,
        corpus=run.data_dir.parent / "corpus.txt",
        data_dir=run.data_dir,
        batch_size=batch_size,
        eval_only=True,
    )
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0"))
    assert float(said.split()[-1]) == pytest.approx(run.val_losses[-1], abs=1e-4)


def test_eval_only_and_prepare_only_write_no_model(tmp_path):
    run = train(tmp_path, prepare_only=True)
    assert (run.data_dir / "prepared.json").exists() and not run.out_dir.exists()
    run = train(tmp_path, eval_only=True)
    assert not run.out_dir.exists()


def test_eval_tokens_limits_both_splits(tmp_path):
    limited = train(tmp_path, max_iters=1, eval_tokens=64)
    whole = train(tmp_path, max_iters=1)
    assert limited.val_losses[0] != whole.val_losses[0]
    assert limited.val_losses[0] == pytest.approx(whole.val_losses[0], abs=0.2)


def test_only_the_best_model_is_kept_unless_all_are(tmp_path):
    # a learning rate at which the first evaluation after the start is the best one
    flags = {"max_iters": 6, "eval_interval": 2, "decay_lr": "false", "warmup_iters": 0, "learning_rate": 0.1}
    latest = train(tmp_path, **flags, grad_clip=0)
    assert min(latest.val_losses) == latest.val_losses[1] < latest.val_losses[-1]
    best = train(tmp_path, **flags, grad_clip=0, always_save_checkpoint="false", out_dir=tmp_path / "best")
    assert best.val_losses == latest.val_losses[:2]
    assert whole_split_loss(best, "val") == pytest.approx(latest.val_losses[1], abs=1e-5)
    assert whole_split_loss(latest, "val") == pytest.approx(latest.val_losses[-1], abs=1e-5)


def test_patience_stops_the_run_and_keeps_the_best_model(tmp_path, capsys):
    # as above, the first evaluation after the start is the best one
    flags = {"eval_interval": 2, "decay_lr": "false", "warmup_iters": 0, "learning_rate": 0.1, "grad_clip": 0}
    best = train(tmp_path, **flags, patience=2)
    assert "stopped at step 6: 2 evaluations without a lower val loss" in capsys.readouterr().out
    assert whole_split_loss(best, "val") == pytest.approx(min(best.val_losses), abs=1e-5)
    assert [path.name for path in sorted(best.out_dir.glob("checkpoints/*"))][-1] == "step-00000006"
    train(tmp_path, **flags, patience=2, init_from="resume")  # is over at once
    said = capsys.readouterr().out
    assert "stopped at step 6" in said and "step 8" not in said
    train(tmp_path, **flags, patience=3, init_from="resume")
    assert "stopped at step 8: 3 evaluations" in capsys.readouterr().out


def test_compiled_training_equals_eager_and_leaves_no_prefix(run, tmp_path):
    compiled = train(tmp_path, compile=True, max_iters=4)
    assert compiled.losses == pytest.approx(run.losses[:4], abs=0.05)
    with safe_open(compiled.out_dir / "model.safetensors", "pt") as file:
        assert all(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118  no dict


def test_a_compiled_model_is_not_compiled_again_for_windows_of_other_lengths(tmp_path):
    texts = tmp_path / "corpus.jsonl"
    texts.write_text("".join(json.dumps({"text": "to be or not " * (1 + i % 4)}) + "\n" for i in range(60)))
    flags = {"windows": "documents", "block_size": 32, "max_iters": 6, "eval_interval": 6}
    torch._dynamo.reset()
    # two are allowed: one to train and one to evaluate
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        run = train(tmp_path, corpus=texts, compile=True, **flags)
    assert len(run.losses) == 6


def test_bfloat16_arithmetic_keeps_float32_weights(run, tmp_path):
    half = train(tmp_path, dtype="bfloat16")
    assert half.losses == pytest.approx(run.losses, abs=0.1) and half.losses != run.losses
    assert {tensor.dtype for tensor in load_file(half.out_dir / "model.safetensors").values()} == {torch.float32}


def test_training_from_a_model_begins_at_its_loss(run, tmp_path):
    more = train(tmp_path, init_from=run.out_dir, data_dir=run.data_dir, corpus=run.data_dir.parent / "corpus.txt")
    assert more.val_losses[0] == pytest.approx(run.val_losses[-1], abs=1e-5)
    assert more.val_losses[-1] < run.val_losses[-1]


def test_init_from_half_precision_trains_float32_weights(run, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(run.out_dir, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(run.out_dir).save_pretrained(tmp_path / "half")
    more = train(tmp_path, init_from=tmp_path / "half", max_iters=1)
    assert {tensor.dtype for tensor in load_file(more.out_dir / "model.safetensors").values()} == {torch.float32}


def test_dropout_may_change_on_the_way(run, tmp_path):
    more = train(tmp_path, init_from=run.out_dir, dropout=0.5, max_iters=1)
    assert AutoModelForCausalLM.from_pretrained(more.out_dir).config.dropout == 0.5


def test_what_is_saved_samples_only_tokens_that_exist(run):
    tokenizer, model = (auto.from_pretrained(run.out_dir) for auto in (AutoTokenizer, AutoModelForCausalLM))
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size > len(tokenizer)
    assert model.config.use_cache is True and tokenizer.model_max_length == TINY["block_size"]
    torch.nn.init.zeros_(model.transformer.wte.weight)  # every id is as likely as any other
    start = torch.full((200, 1), 5)
    ids = model.generate(start, do_sample=True, top_k=0, max_new_tokens=5, eos_token_id=-1)
    assert ids.max() < len(tokenizer)


def test_a_killed_run_leaves_a_model_that_loads(run, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(run.out_dir, out_dir)
    (out_dir / ".saving").mkdir()
    (out_dir / ".saving" / "model.safetensors").write_bytes(b"half")
    assert math.isfinite(AutoModelForCausalLM.from_pretrained(out_dir).lm_head.weight.sum().item())
    again = train(tmp_path, max_iters=1)
    assert not (again.out_dir / ".saving").exists()
