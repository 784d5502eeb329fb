"""A recipe so small that a run takes seconds, and a function that does such a run in this process."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoTokenizer

import train_accelerate
from modeling_nanogpt.sources import load_model
from modeling_nanogpt.training.hooks import NO_HOOKS, Hooks
from support.texts import write_words

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
    "compile": False,  # on a GPU, compiling would take most of the time
}


def write_recipe(path: Path, **flags) -> Path:
    path.write_text("".join(f"{key}: {value}\n" for key, value in flags.items()))
    return path


def train(folder: Path, hooks: Hooks = NO_HOOKS, **flags) -> SimpleNamespace:
    """Run the trainer in this process on the tiny recipe, and read back what it wrote."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_words(corpus)
    flags = {"corpus": corpus, "data_dir": folder / "data", "out_dir": folder / "out"} | TINY | flags
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several runs
    GradientState._reset_state()
    recipe = write_recipe(folder / "recipe.yaml", **flags)
    train_accelerate.main(*train_accelerate.parse_arguments([str(recipe)]), hooks=hooks)
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


@torch.no_grad()
def with_random_weights(run: SimpleNamespace, folder: Path) -> Path:
    """A copy of a run's folder with other weights. Its text does not repeat itself, so each mistake shows."""
    shutil.copytree(run.out_dir, folder)
    model, tokenizer = load_model(str(folder)), AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.normal_(std=0.3, generator=generator)
    used = tokenizer((run.out_dir.parent / "corpus.txt").read_text()).input_ids
    unused = torch.ones(model.config.vocab_size, dtype=torch.bool).index_fill(0, torch.tensor(used), False)
    model.get_input_embeddings().weight[unused] = 0  # a token that is not text has the logit zero, and is never first
    model.save_pretrained(folder)
    return folder
