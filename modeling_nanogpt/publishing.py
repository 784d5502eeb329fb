"""What a person sees of a run beside its weights: the model card, the loss plot and the losses themselves."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from string import Template

from .configuration_nanogpt import NanoGPTConfig


def write_report(
    folder: Path,
    template: str,
    name: str,
    config: NanoGPTConfig,
    record: dict,
    history: list[dict],
    step: int,
    tokens_seen: int,
) -> None:
    """Write README.md (the model card), loss.png and history.jsonl into the folder of a model that was just saved.

    `template` is the card with $names to fill, `record` the data_dir's, `history` the log up to optimizer step `step`,
    whose last entry holds the validation loss in nats a token.
    """
    val_loss = history[-1]["val_loss"]
    perplexity = math.exp(val_loss) if val_loss < 700 else math.inf  # beyond, it is no float
    facts = {
        "name": name,
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")},
        **{key: record[key] for key in ("corpus", "sha256", "tokenizer")},
        "sample_length": min(100, config.block_size),
        "step": f"{step:,}",
        "tokens_seen": f"{tokens_seen:,}",
        "val_loss": f"{val_loss:.4f}",
        "perplexity": f"{perplexity:.2f}",
        "bits_per_byte": f"{val_loss / math.log(2) * record['tokens']['val'] / record['bytes']['val']:.4f}",
        "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate")),
    }
    (folder / "README.md").write_text(Template(template).substitute(facts), encoding="utf-8")
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    plot_losses(folder / "loss.png", history)


def plot_losses(path: Path, history: list[dict]) -> None:
    """Draw training and validation loss (nats a token) against optimizer steps, as a PNG."""
    from matplotlib.figure import (
        Figure,
    )  # only a save needs it; without pyplot there is no display and no global state

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training, as logged", "-"), ("val_loss", "validation", "o-")):
        values = [(entry["step"], entry.get(key)) for entry in history]  # None: each step there was skipped
        points = [(step, value) for step, value in values if value is not None and math.isfinite(value)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)
