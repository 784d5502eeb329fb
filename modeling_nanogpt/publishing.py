"""What a person sees of a run beside its weights: the model card, samples, the loss plot and the losses themselves."""

import json
import math
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedTokenizerBase

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import CACHE
from .notes import notes_of, with_notes
from .throughput import flops_per_token

METRICS = {
    "loss": "validation loss (nats a token)",
    "perplexity": "validation perplexity",
    "bits_per_byte": "validation bits a byte",
}


@dataclass(frozen=True)
class Report:
    """The card, the plot and the log of a run: made once, of what does not change, and written at each save."""

    template: str  # the card, with $names to fill
    name: str  # the folder or Hub id that the card's code loads
    config: NanoGPTConfig
    parameters: int
    record: dict  # the data_dir's: what the text was
    recipe: dict  # every flag of the run
    step_tokens: int  # tokens in an optimizer step
    hardware: str  # processes, devices and arithmetic
    commit: str | None  # of this project's checkout

    def write(self, folder: Path, history: list[dict], step: int, samples: list[str], earlier: Path) -> None:
        """Write README.md, loss.png, history.jsonl and run.yaml into the folder of a model that was just saved.

        `history` is the log up to optimizer step `step`; its last entry holds the validation loss in nats a token.
        The notes of the `earlier` card, where there is one, are kept.
        """
        card = self.card(history, step, samples)
        if earlier.is_file():
            card = with_notes(card, notes_of(earlier.read_text(encoding="utf-8")))
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        (folder / "run.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True))
        plot_losses(folder / "loss.png", history, self.step_tokens)

    def card(self, history: list[dict], step: int, samples: list[str]) -> str:
        """The model card: YAML that the Hub reads, then Markdown."""
        record, tokens_seen = self.record, step * self.step_tokens
        values = measure(float(history[-1]["val_loss"]), record)
        start, revision = self.recipe.get("init_from", "scratch"), record.get("revision")
        facts = {
            **{key: getattr(self.config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")},
            **{key: record[key] for key in ("corpus", "sha256", "tokenizer")},
            "metadata": self.metadata(values).to_yaml().strip(),
            "name": self.name,
            "parameters": f"{self.parameters:,}",
            "start": "from scratch" if start == "scratch" else f"from `{start}`",
            "text": f"`{record['corpus']}`" + (f" at revision `{revision}`" if revision else ""),
            "loss": f"{values['loss']:.4f}",
            "perplexity": f"{values['perplexity']:.2f}",
            "bits_per_byte": f"{values['bits_per_byte']:.4f}",
            "samples": "\n\n".join(fence(sample) for sample in samples) or "None were drawn.",
            "sample_length": min(100, self.config.block_size),
            "vocab_size": f"{record['vocab_size']:,}",
            "train_tokens": f"{record['tokens']['train']:,}",
            "val_tokens": f"{record['tokens']['val']:,}",
            "step": f"{step:,}",
            "tokens_seen": f"{tokens_seen:,}",
            "epochs": f"{tokens_seen / record['tokens']['train']:.2f}",
            "flops": f"{tokens_seen * flops_per_token(self.config):.2e}",
            "time": show_seconds(training_seconds(history, self.step_tokens)),
            "hardware": self.hardware,
            "versions": ", ".join(
                f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate", "datasets")
            ),
            "commit": f"`{self.commit}`" if self.commit else "unknown, as it ran outside of a checkout",
            "recipe": fence(yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True), "yaml"),
            "overrides": " --push_to_hub=false" if self.recipe.get("push_to_hub") else "",
        }
        return Template(self.template).substitute(facts)

    def metadata(self, values: dict[str, float]) -> ModelCardData:
        """The part of the card that the Hub reads; a value that is no number is left out."""
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{Path(self.record['corpus']).name}, held-out part",
                metric_type=metric,
                metric_name=label,
                metric_value=round(values[metric], 4),
            )
            for metric, label in METRICS.items()
            if math.isfinite(values[metric])
        ]
        base = self.recipe.get("init_from", "scratch")
        return ModelCardData(
            base_model=None if base == "scratch" or Path(base).exists() else base,  # else it is a Hub id, as this is:
            datasets=[self.record["corpus"]] if self.record.get("revision") else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["nanogpt"],
            model_name=self.name.split("/")[-1] if results else None,
            eval_results=results or None,
        )


def measure(val_loss: float, record: dict) -> dict[str, float]:
    """The validation loss in nats a token, as perplexity, and in bits a UTF-8 byte of the held-out text."""
    return {
        "loss": val_loss,
        "perplexity": math.exp(val_loss) if val_loss < 700 else math.inf,  # beyond, it is no float
        "bits_per_byte": val_loss / math.log(2) * record["tokens"]["val"] / max(record["bytes"]["val"], 1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Facts of a run


def training_seconds(history: list[dict], step_tokens: int) -> float:
    """Seconds of training that the log accounts for: without evaluation, saving and the steps after its last entry."""
    seconds, before = 0.0, 0
    for entry in history:
        if "tokens_per_second" in entry:
            seconds += (entry["step"] - before) * step_tokens / entry["tokens_per_second"]
            before = entry["step"]
    return seconds


def show_seconds(seconds: float) -> str:
    """A time as a person says it."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 2:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 120 else f"{hours} h"


def find_commit() -> str | None:
    """The git commit of this project's checkout, `-dirty` where files were changed; None where it is installed."""
    here = Path(__file__).resolve()
    tracked = ["git", "ls-files", "--error-unmatch", here.name]  # not so in a checkout that an environment lies in
    commit = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        for command in (tracked, commit):
            git = subprocess.run(command, cwd=here.parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Samples and the plot


@torch.no_grad()
def draw_samples(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, block_size: int, device: torch.device
) -> list[str]:
    """Three texts from a newline on, up to 100 tokens each, at temperature 0.8 among the 200 likeliest tokens.

    The model may be wrapped for several processes if all of them call this. It draws by a generator of its own: the
    same weights give the same texts, and training goes on as if nothing had been drawn.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(1337)
    start = opening(tokenizer)
    ids = torch.tensor([start] * 3)  # (3, T)
    new, cache = ids, None
    with torch.compiler.set_stance("force_eager"):  # one token at a time is no shape to compile for
        while ids.shape[1] < min(block_size, 100):
            output = model(input_ids=new.to(device), cache=cache, use_cache=True)
            logits = output.logits[:, -1, : len(tokenizer)].float().cpu() / 0.8
            likeliest = logits.topk(min(200, logits.shape[1]))
            choice = torch.multinomial(likeliest.values.softmax(-1), 1, generator=generator)
            new, cache = likeliest.indices.gather(1, choice), output[CACHE]  # (3, 1)
            ids = torch.cat([ids, new], dim=1)
    model.train(was_training)
    rows, end = [row[len(start) :] for row in ids.tolist()], tokenizer.eos_token_id
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a newline, or of the end of another text where no token spells one."""
    try:
        ids = tokenizer("\n", add_special_tokens=False).input_ids
    except Exception:  # the class that the library raises where a vocabulary has no token for a character
        ids = []
    return ids or [tokenizer.eos_token_id or 0]


def fence(text: str, language: str = "text") -> str:
    """A text as a Markdown block that nothing in it can end, without characters that are no text."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def plot_losses(path: Path, history: list[dict], step_tokens: int) -> None:
    """Draw the losses of both splits (nats a token) against the tokens trained on, as a PNG.

    The fall of the first twentieth may leave the picture at its top, as on its scale the rest would look flat; an
    evaluation that lies up there is left out.
    """
    # only a save needs it; without pyplot there is no display and no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    last_step = max(entry["step"] for entry in history)
    points = {  # of each kind of loss, those that are numbers
        key: [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key, math.nan))]
        for key in ("loss", "eval_train_loss", "val_loss")
    }
    shown = [loss for kind in points.values() for step, loss in kind if step > last_step / 20 or last_step == 0]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    best = min((loss for _, loss in points["val_loss"]), default=math.nan)
    for key, label, style in (
        ("loss", "training, as logged", {"color": "#c6dbef", "linewidth": 1}),
        ("eval_train_loss", "training, evaluated", {"color": "#1f77b4", "marker": "o", "markersize": 3}),
        ("val_loss", f"validation, lowest {best:.3f}", {"color": "#ff7f0e", "marker": "o", "markersize": 3}),
    ):
        drawn = [(step * step_tokens, loss) for step, loss in points[key] if key == "loss" or loss <= high]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), label=label, **style)
    axes.set_ylim(low, high)
    if axes.lines:
        axes.legend(frameon=False)
    engineering = EngFormatter(sep="")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: engineering(tokens).replace("G", "B")))
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
