"""What a person sees of a run beside its weights: the model card, samples, the plot of the losses, and the log."""

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

from ..card_notes import notes_of, with_notes
from ..decoding import Diverged, FixedReader, Reader, continue_prompt, opening
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..throughput import flops_per_token
from .checkpointing import TrainState, to_json
from .describing import RunFacts

METRICS = {
    "loss": "validation loss (nats a token)",
    "perplexity": "validation perplexity",
    "bits_per_byte": "validation bits a byte",
}


@dataclass(frozen=True)
class Report:
    """The card, the plot and the log of a run, written at each save."""

    facts: RunFacts
    template: str  # the card, with $names to fill
    name: str  # the folder or Hub id that the card's code loads
    commit: str | None  # of this project's checkout

    def write(self, folder: Path, state: TrainState, samples: list[str], earlier: Path) -> None:
        """Write the card, the plot, the log, the samples and the recipe into the folder of a model just saved.

        The last entry of the log holds the validation loss in nats a token. If there is an `earlier` card, its notes
        are kept.
        """
        card = self.card(state, samples)
        if earlier.is_file():
            card = with_notes(card, notes_of(earlier.read_text(encoding="utf-8")))
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name, entries in (("history.jsonl", state.history), ("samples.jsonl", state.samples)):
            lines = "".join(to_json(entry) + "\n" for entry in entries)
            (folder / name).write_text(lines, encoding="utf-8")
        flags = yaml.safe_dump(self.facts.recipe, sort_keys=False, allow_unicode=True)
        (folder / "run.yaml").write_text(flags, encoding="utf-8")
        plot_losses(folder / "loss.png", state.history, self.facts.step_tokens)

    def card(self, state: TrainState, samples: list[str]) -> str:
        """The model card: YAML that the Hub reads, then Markdown."""
        history, step = state.history, state.step
        data, tokens_seen = self.facts.data, step * self.facts.step_tokens
        values = measure(float(history[-1]["val_loss"]), data)
        start, revision = self.facts.recipe.get("init_from", "scratch"), data.get("revision")
        facts = {
            **{key: getattr(self.facts.config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")},
            **{key: data[key] for key in ("corpus", "sha256", "tokenizer")},
            "metadata": self.metadata(values).to_yaml().strip(),
            "name": self.name,
            "parameters": f"{self.facts.parameters:,}",
            "start": "from scratch" if start == "scratch" else f"from `{start}`",
            "text": f"`{data['corpus']}`" + (f" at revision `{revision}`" if revision else ""),
            "loss": f"{values['loss']:.4f}",
            "perplexity": f"{values['perplexity']:.2f}",
            "bits_per_byte": f"{values['bits_per_byte']:.4f}",
            "samples": "\n\n".join(fence(sample) for sample in samples) or "None were drawn.",
            "earlier_samples": show_learning(state.samples),
            "sample_length": min(100, self.facts.config.block_size),
            "vocab_size": f"{data['vocab_size']:,}",
            "train_tokens": f"{data['tokens']['train']:,}",
            "val_tokens": f"{data['tokens']['val']:,}",
            "step": f"{step:,}",
            "tokens_seen": f"{tokens_seen:,}",
            "epochs": f"{tokens_seen / data['tokens']['train']:.2f}",
            "flops": f"{tokens_seen * flops_per_token(self.facts.config):.2e}",
            "time": show_seconds(training_seconds(history, self.facts.step_tokens)),
            "hardware": self.facts.hardware,
            "versions": ", ".join(
                f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate", "datasets")
            ),
            "commit": f"`{self.commit}`" if self.commit else "unknown, because it ran outside of a checkout",
            "recipe": fence(yaml.safe_dump(self.facts.recipe, sort_keys=False, allow_unicode=True), "yaml"),
            "overrides": " --push_to_hub=false" if self.facts.recipe.get("push_to_hub") else "",
        }
        return Template(self.template).substitute(facts)

    def metadata(self, values: dict[str, float]) -> ModelCardData:
        """The part of the card that the Hub reads. A value that is not finite is left out."""
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{Path(self.facts.data['corpus']).name}, held-out part",
                metric_type=metric,
                metric_name=label,
                metric_value=round(values[metric], 4),
            )
            for metric, label in METRICS.items()
            if math.isfinite(values[metric])
        ]
        base = self.facts.recipe.get("init_from", "scratch")
        base_is_on_the_hub = base != "scratch" and not Path(base).exists()
        corpus_is_on_the_hub = bool(self.facts.data.get("revision"))
        return ModelCardData(
            base_model=base if base_is_on_the_hub else None,
            datasets=[self.facts.data["corpus"]] if corpus_is_on_the_hub else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["nanogpt"],
            model_name=self.name.split("/")[-1] if results else None,
            eval_results=results or None,
        )


def measure(val_loss: float, data: dict) -> dict[str, float]:
    """The validation loss in nats a token, as perplexity, and in bits a UTF-8 byte of the held-out text."""
    return {
        "loss": val_loss,
        "perplexity": math.exp(val_loss) if val_loss < 700 else math.inf,  # a float cannot hold more
        "bits_per_byte": val_loss / math.log(2) * data["tokens"]["val"] / max(data["bytes"]["val"], 1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Facts of a run


def training_seconds(history: list[dict], step_tokens: int) -> float:
    """Seconds of training that the log accounts for, without evaluation, saving and the steps after its last entry."""
    seconds, before = 0.0, 0
    for entry in history:
        if "tokens_per_second" in entry:
            seconds += (entry["step"] - before) * step_tokens / entry["tokens_per_second"]
            before = entry["step"]
    return seconds


def show_seconds(seconds: float) -> str:
    """A time as a person would say it."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 2:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 120 else f"{hours} h"


def find_commit() -> str | None:
    """The git commit of this project's checkout, with `-dirty` if files were changed. None if it is installed."""
    here = Path(__file__).resolve()
    # fails if this file lies in an environment inside somebody else's checkout
    tracked = ["git", "ls-files", "--error-unmatch", here.name]
    commit = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        for command in (tracked, commit):
            git = subprocess.run(command, cwd=here.parent, check=True, capture_output=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Samples and the plot


def draw_samples(model: NanoGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Three texts that follow a newline, up to 100 tokens each, at temperature 0.8 among the 200 likeliest tokens.

    If the weights are sharded, all processes must call this. The generator is its own: the same weights give the same
    texts on the same device, and training goes on as if nothing had been drawn. A model that has diverged, so that it
    predicts no numbers, gives no texts.
    """
    was_training = model.training
    model.eval()
    prompt = torch.tensor([opening(tokenizer)] * 3, device=model.device)  # (3, T)
    length = min(model.config.block_size, 100)
    reader = FixedReader(model, length) if model.device.type == "cuda" else Reader(model)  # too few for a graph
    with torch.compiler.set_stance("force_eager"):  # a batch of one token at a time is not worth compiling
        tokens = continue_prompt(
            model,
            prompt,
            max(length - prompt.shape[1], 1),
            temperature=0.8,
            top_k=200,
            generator=torch.Generator(model.device).manual_seed(1337),
            reader=reader,
        )
        try:
            rows = torch.stack(list(tokens), dim=1).tolist()  # (3, N)
        except Diverged:
            rows = []
    model.train(was_training)
    texts: list[str] = []
    for row in rows:
        if tokenizer.eos_token_id in row:
            row = row[: row.index(tokenizer.eos_token_id)]
        texts.append(str(tokenizer.decode(row)))
    return texts


def in_one_line(text: str, longest: int = 90) -> str:
    """The beginning of a text, without line ends and control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def show_learning(samples: list[dict]) -> str:
    """The first sample of the first, a middle and the last save, as Markdown."""
    if not samples:
        return "None were drawn."
    middle = samples[len(samples) // 2]
    chosen = {each["step"]: each["text"] for each in (samples[0], middle, samples[-1])}
    return "\n\n".join(f"After {step:,} steps:\n\n{fence(text)}" for step, text in chosen.items())


def fence(text: str, language: str = "text") -> str:
    """A text as a Markdown block that nothing in the text can end, without control characters."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def plot_losses(path: Path, history: list[dict], step_tokens: int) -> None:
    """Draw the losses of both splits (nats a token) against the tokens trained on, as a PNG.

    The scale fits the losses after the first twentieth of the run, because otherwise they would look flat. Earlier
    losses may leave the picture at its top, and an evaluation that lies up there is left out.
    """
    # imported here because only a save needs it; without pyplot, there is no display and no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    last_step = max(entry["step"] for entry in history)
    points = {  # for each kind of loss, the finite ones
        key: [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key) or math.nan)]
        for key in ("loss", "eval_train_loss", "val_loss")
    }
    shown = [loss for kind in points.values() for step, loss in kind if step > last_step / 20 or last_step == 0]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    best = min((loss for _, loss in points["val_loss"]), default=math.nan)
    styles: tuple[tuple[str, str, dict], ...] = (
        ("loss", "training, as logged", {"color": "#c6dbef", "linewidth": 1}),
        ("eval_train_loss", "training, evaluated", {"color": "#1f77b4", "marker": "o", "markersize": 3}),
        ("val_loss", f"validation, lowest {best:.3f}", {"color": "#ff7f0e", "marker": "o", "markersize": 3}),
    )
    for key, label, style in styles:
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
