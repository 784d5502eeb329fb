"""What every test shares: no network, one thread each (fastest for models this small), and a run to look at."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in every process that a test starts

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import Hub

import train_accelerate

TINY = {
    "tokenizer": "char",
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "max_iters": 20,
    "warmup_iters": 2,
    "eval_interval": 10,
    "log_interval": 1,
}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def write_corpus(path: Path) -> Path:
    """A text of 6,000 characters with something to learn in it: words out of a small vocabulary."""
    words = random.Random(0).choices(["to", "be", "or", "not", "question", "noble", "slings\n"], k=2000)
    path.write_text(" ".join(words)[:6000])
    return path


def write_recipe(path: Path, **flags) -> Path:
    path.write_text("".join(f"{key}: {value}\n" for key, value in flags.items()))
    return path


def train(folder: Path, **flags) -> SimpleNamespace:
    """Run the trainer in this process on the tiny recipe, and read back what it wrote."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    flags = {"corpus": corpus, "data_dir": folder / "data", "out_dir": folder / "out"} | TINY | flags
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several runs
    GradientState._reset_state()
    train_accelerate.main([str(write_recipe(folder / "recipe.yaml", **flags))])
    out_dir = Path(flags["out_dir"])
    log = out_dir / "history.jsonl"
    history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return SimpleNamespace(
        out_dir=out_dir,
        data_dir=Path(flags["data_dir"]),
        history=history,
        losses=[entry["loss"] for entry in history if "loss" in entry],
        rates=[entry["lr"] for entry in history if "lr" in entry],
        val_losses=[entry["val_loss"] for entry in history if "val_loss" in entry],
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of the tiny recipe, to read and never to write."""
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub():
    """An empty Hub on loopback, for processes that a test starts by its `run`."""
    with Hub() as hub:
        yield hub
