"""Mistakes in starting the trainer: one line names the mistake and the remedy, and nothing is written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import LlamaConfig

import train_accelerate
from support import PATIENCE
from support.texts import write_words
from support.tiny_run import TINY, write_recipe
from tokenization.arguments import DataArguments
from tokenization.prepare import prepare

TRAINER = Path(train_accelerate.__file__)
# The places of data_dir and out_dir, two levels down, so that a folder made on the way to them is seen too.
FLAGS = TINY | {"corpus": "corpus.txt", "data_dir": "new/data", "out_dir": "fresh/out"}


@pytest.fixture(scope="module")
def all_inputs(run, tmp_path_factory):
    """A folder with a good text, data_dir and model, and with broken ones beside them."""
    folder = tmp_path_factory.mktemp("inputs")
    text = write_words(folder / "corpus.txt").read_text()
    (folder / "other.txt").write_text(text[::-1])
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"words, caf\xe9, words")
    (folder / "short.txt").write_text("to be or not to be")
    (folder / "empty-folder").mkdir()
    shutil.copytree(run.data_dir, folder / "prepared")
    prepare(DataArguments(str(folder / "corpus.txt"), "bpe", 300, str(folder / "prepared-bpe")))
    shutil.copytree(run.out_dir, folder / "model")
    for name in ("weights", "config", "tokenizer"):
        shutil.copytree(run.out_dir, folder / f"model-without-{name}")
    (folder / "model-without-weights" / "model.safetensors").unlink()
    (folder / "model-without-config" / "config.json").unlink()
    for path in (folder / "model-without-tokenizer").glob("tokenizer*"):
        path.unlink()
    LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1).save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def inputs(all_inputs, tmp_path):
    """A copy of that folder for one test. If the trainer does write something, other tests do not see it."""
    return shutil.copytree(all_inputs, tmp_path / "inputs")


def files_below(folder):
    """A value that changes if a file below the folder is written, added or removed."""
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in sorted(folder.rglob("*"))}


def without_progress(stderr):
    """The lines that a process wrote on stderr, apart from progress bars."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip("\x1b[A ") and not re.search(r"\d+%\|.*\d+/\d+ \[", line)]


@pytest.fixture
def refusal(inputs, tmp_path, monkeypatch, capsys):
    """Run the trainer with flags that it must refuse. Returns the line that says why."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the same answer on a machine that has a GPU

    def refuse(**flags):
        flags = {key: value for key, value in (FLAGS | flags).items() if value is not None}
        recipe = write_recipe(tmp_path / "recipe.yaml", **flags)
        before = files_below(inputs)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with pytest.raises(SystemExit) as stop:  # anything else would be a traceback
            train_accelerate.main(*train_accelerate.parse_arguments([str(recipe)]))
        assert files_below(inputs) == before
        shown = capsys.readouterr()
        assert shown.out == ""
        said = without_progress(shown.err)
        if isinstance(stop.value.code, str):  # Python prints it when it exits, with status 1
            said += stop.value.code.splitlines()
        else:
            assert stop.value.code == 2
        (line,) = said
        program, error, message = line.partition(": error: ")
        assert error
        return message

    return refuse


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"n_head": 3}, ["n_embd=32", "n_head=3"]),
        ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
        ({"n_embd": -32}, ["n_embd=-32", "at least 1"]),
        ({"block_size": 0}, ["block_size=0", "at least 1"]),
        ({"dropout": 1.5}, ["dropout=1.5", "below 1"]),
        ({"dropout": -0.1}, ["dropout=-0.1", "at least 0"]),
        ({"dropout": "nan"}, ["dropout=nan"]),
        ({"activation_function": "relu"}, ["activation_function", "relu", "gelu_new"]),
    ],
    ids=str,
)
def test_a_shape_that_is_not_a_model_is_refused(refusal, flags, said):
    message = refusal(**flags)
    assert all(part in message for part in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 2**32}, ["seed=4294967296"]),
        ({"eval_tokens": -1}, ["eval_tokens=-1"]),
        ({"warmup_iters": -1}, ["warmup_iters=-1"]),
        ({"learning_rate": -1e-3}, ["learning_rate=-0.001"]),
        ({"learning_rate": "nan"}, ["learning_rate=nan"]),
        ({"learning_rate": "inf"}, ["learning_rate=inf"]),
        ({"min_lr": -1e-3}, ["min_lr=-0.001"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1"]),
        ({"grad_clip": -1.0}, ["grad_clip=-1.0"]),
        ({"beta1": 1.5}, ["beta1=1.5", "below 1"]),
        ({"average_decay": 1}, ["average_decay=1.0", "below 1"]),
        ({"muon_weight_decay": -0.1}, ["muon_weight_decay=-0.1", "at least 0"]),
        ({"momentum_warmup_iters": -1}, ["momentum_warmup_iters=-1", "at least 0"]),
        ({"momentum_cooldown_iters": -1}, ["momentum_cooldown_iters=-1", "at least 0"]),
        ({"beta2": -0.1}, ["beta2=-0.1", "at least 0"]),
    ],
    ids=str,
)
def test_a_number_with_which_nothing_can_be_trained_is_refused(refusal, flags, said):
    message = refusal(**flags)
    assert all(part in message for part in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"corpus": "missing.txt"}, ["corpus=missing.txt", "python-stdlib"]),
        ({"corpus": "empty.txt"}, ["corpus=empty.txt", "no text"]),
        ({"corpus": "empty-folder"}, ["corpus=empty-folder", ".txt"]),
        ({"corpus": "latin.txt"}, ["latin.txt", "UTF-8", "byte 10"]),
        ({"corpus": "short.txt"}, ["train split", "16 tokens", "takes 17", "--corpus", "block_size"]),
        ({"block_size": 4000}, ["val split", "600 tokens", "takes 4001", "--corpus", "block_size"]),
        ({"data_dir": "prepared", "block_size": 4000}, ["val split", "600 tokens", "takes 4001", "block_size"]),
        ({"corpus": None}, ["data_dir=new/data", "--corpus"]),
        ({"tokenizer": "missing"}, ["tokenizer=missing", "char", "bpe"]),
        ({"data_dir": "prepared", "corpus": "other.txt"}, ["data_dir=prepared", "corpus=other.txt", "--data_dir"]),
        ({"data_dir": "prepared", "tokenizer": "bpe"}, ["data_dir=prepared", "char", "bpe", "--data_dir"]),
        ({"data_dir": "prepared-bpe"}, ["data_dir=prepared-bpe", "bpe", "char", "--data_dir"]),
        ({"data_dir": "model"}, ["data_dir=model", "--data_dir"]),
        ({"data_dir": "corpus.txt"}, ["data_dir=corpus.txt", "--data_dir"]),
        ({"data_dir": "corpus.txt/data"}, ["data_dir=corpus.txt/data"]),
    ],
    ids=str,
)
def test_a_text_that_cannot_be_trained_on_is_refused(refusal, flags, said):
    message = refusal(**flags)
    assert all(part in message for part in said)


def test_a_folder_for_the_text_that_the_recipe_only_implies_is_not_left_behind(refusal):
    assert "corpus=missing.txt" in refusal(corpus="missing.txt", data_dir=None)  # data/recipe


@pytest.mark.parametrize("out_dir", ["corpus.txt", "corpus.txt/out", "corpus.txt/below/out"])
def test_a_place_that_cannot_be_written_is_refused(refusal, out_dir):
    message = refusal(out_dir=out_dir)
    assert f"out_dir={out_dir}" in message and "--out_dir" in message


def test_float16_is_refused_on_a_cpu(refusal):
    message = refusal(dtype="float16")
    assert "dtype=float16" in message and "--dtype=float32" in message and "--dtype=bfloat16" in message


def test_attention_that_cannot_be_trained_on_a_cpu_is_refused(refusal):
    message = refusal(attn_implementation="flex_attention")
    assert "attn_implementation=flex_attention" in message and "sdpa, plain or eager" in message


@pytest.mark.parametrize(
    ("launched", "dtype", "said"),
    [
        ("fp16", "float32", ["dtype=float32", "mixed_precision=fp16"]),
        ("bf16", "float32", ["dtype=float32", "mixed_precision=bf16"]),
        ("bf16", "float16", ["dtype=float16", "mixed_precision=bf16"]),
        ("fp16", "auto", ["mixed_precision=fp16", "CPU", "--mixed_precision=no"]),
        ("fp8", "auto", ["mixed_precision=fp8", "bf16"]),
    ],
)
def test_a_launcher_that_asks_for_another_precision_is_refused(refusal, monkeypatch, launched, dtype, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)  # as `accelerate launch --mixed_precision` does
    message = refusal(dtype=dtype)
    assert all(part in message for part in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"init_from": "missing"}, ["init_from=missing"]),
        ({"init_from": "no/such/folder"}, ["init_from=no/such/folder"]),
        ({"init_from": "empty-folder"}, ["init_from=empty-folder"]),
        ({"init_from": "corpus.txt"}, ["init_from=corpus.txt"]),
        ({"init_from": "model-without-config"}, ["init_from=model-without-config", "config.json"]),
        ({"init_from": "model-without-tokenizer"}, ["init_from=model-without-tokenizer", "tokenizer"]),
        ({"init_from": "model-without-weights"}, ["init_from=model-without-weights", "weights"]),
        ({"init_from": "llama"}, ["init_from=llama", "type llama", "nanogpt"]),
        ({"init_from": "model", "n_layer": 3}, ["n_layer=3", "n_layer=2", "init_from=model", "leave it out"]),
        ({"init_from": "model", "block_size": 32}, ["block_size=32", "block_size=16", "leave it out"]),
        ({"init_from": "model", "n_embd": 64}, ["n_embd=64", "n_embd=32", "leave it out"]),
        ({"init_from": "model", "bias": "true"}, ["bias=True", "bias=False", "leave it out"]),
        ({"init_from": "model", "activation_function": "gelu_new"}, ["gelu_new", "leave it out"]),
        ({"init_from": "model", "dropout": 1.5}, ["dropout=1.5", "below 1"]),
        (
            {"init_from": "model", "data_dir": "prepared-bpe", "tokenizer": "bpe", "vocab_size": 300},
            ["data_dir=prepared-bpe", "init_from=model", "--tokenizer=model"],
        ),
        (
            {"init_from": "model", "tokenizer": "bpe", "vocab_size": 300},  # data_dir is not there yet
            ["data_dir=new/data", "init_from=model", "--tokenizer=model"],
        ),
    ],
    ids=str,
)
def test_a_model_from_which_training_cannot_start_is_refused(refusal, flags, said):
    message = refusal(**flags)
    assert all(part in message for part in said)


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own: what libraries print while they are imported counts too


def start(inputs, tmp_path, launcher, environment, **flags):
    """Run the trainer from the shell. Returns the finished process, which must have written nothing."""
    recipe = write_recipe(tmp_path / "recipe.yaml", **FLAGS | flags)
    before = files_below(inputs)
    dropped = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")
    process = subprocess.run(
        [sys.executable, *launcher, TRAINER, recipe],
        cwd=inputs,
        env={key: value for key, value in os.environ.items() if key not in dropped} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,  # a process would wait forever for another one that has ended
    )
    assert files_below(inputs) == before
    assert process.returncode != 0
    assert process.stdout == ""
    return process


def test_a_mistake_is_all_that_a_process_says(inputs, tmp_path):
    process = start(inputs, tmp_path, [], {}, corpus="missing.txt")
    (line,) = process.stderr.splitlines()
    assert line.startswith("train_accelerate.py: error: corpus=missing.txt")


def refusals_of_two(inputs, tmp_path, environment, **flags):
    """What two processes say before they stop. The launcher adds an account of its own, with its own traceback."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = start(inputs, tmp_path, launcher, environment, **flags)
    assert f'File "{TRAINER}"' not in process.stderr
    return set(re.findall(r"train_accelerate\.py: error: (.*)", process.stderr))


def test_micro_batches_that_two_processes_cannot_share_equally_are_refused(inputs, tmp_path):
    (message,) = refusals_of_two(inputs, tmp_path, {"ACCELERATE_USE_CPU": "true"}, gradient_accumulation_steps=3)
    assert "gradient_accumulation_steps=3" in message and "divisible" in message and "2" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the processes find each other")
def test_two_processes_that_would_each_train_alone_are_refused(inputs, tmp_path):
    (message,) = refusals_of_two(inputs, tmp_path, {}, gradient_accumulation_steps=4)
    assert "2 processes" in message and "ACCELERATE_USE_CPU=true" in message
