"""Draw the losses of several runs over tokens and over seconds, and print a table of them.

    python -m modeling_nanogpt.compare out/shakespeare_char_cpu out/shakespeare_char_cpu_fast --loss 1.9
    python -m modeling_nanogpt.compare out/* --plot runs.svg

All numbers come from the files that a run writes into its out_dir, so runs that are at work can be compared too.
Seconds count training, without evaluation and saving.
"""

import argparse
import json
import math
import sys
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from command_start import begin_command

from .command_line import CommandParser

parser = CommandParser(
    "modeling_nanogpt.compare", usage="OUT_DIR [OUT_DIR ...] [--flag VALUE ...]", description=__doc__
)
parser.add_path("out_dirs", metavar="OUT_DIR", nargs="+", help="folder of a run, with its history.jsonl")
parser.add_path(
    "--plot",
    metavar="FILE",
    default="compare.png",
    help="picture to draw, a .png, .svg or .pdf (default: compare.png)",
)
parser.add_number("--loss", 0.0, "validation loss (nats a token) to find the step and the time of; 0 means none")
parser.add_argument("--json", action="store_true", help="print the table as JSON")


@dataclass
class Run:
    """The log of a run. A point is (optimizer step, loss in nats a token)."""

    name: str
    step_tokens: int  # tokens in an optimizer step
    training: list[tuple[int, float]] = field(default_factory=list)  # mean over the steps since the point before
    validation: list[tuple[int, float]] = field(default_factory=list)
    clock: list[tuple[int, float]] = field(default_factory=lambda: [(0, 0.0)])  # (step, seconds of training until it)

    @property
    def steps(self) -> int:
        return max([step for step, _ in self.training + self.validation], default=0)

    def seconds(self, step: float) -> float:
        """Seconds of training until a step, on the line between two entries of the log; NaN if no entry has a time."""
        if len(self.clock) == 1:
            return math.nan
        after = min(max(bisect_left(self.clock, (step,)), 1), len(self.clock) - 1)
        (step_0, seconds_0), (step_1, seconds_1) = self.clock[after - 1 : after + 1]
        return seconds_0 + (step - step_0) * (seconds_1 - seconds_0) / (step_1 - step_0)

    def step_of(self, loss: float) -> float | None:
        """The step at which the validation loss first came down to a value, on the line between two evaluations."""
        before = None
        for step, value in self.validation:
            if value <= loss:
                if before is None:
                    return step
                return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            before = step, value
        return None

    def summary(self, loss: float) -> dict:
        """The row of this run in the table. Unless `loss` is 0, the row says when the run reached this loss."""
        best_step, best = min(self.validation, key=lambda point: point[1], default=(None, None))
        row = {
            "run": self.name,
            "steps": self.steps,
            "tokens": self.steps * self.step_tokens,
            "seconds": none_for_nan(self.seconds(self.steps)),
            "best val loss": best,
            "at step": best_step,
        }
        if loss:
            step = self.step_of(loss)
            row[f"steps to {loss:g}"] = step
            row[f"seconds to {loss:g}"] = None if step is None else none_for_nan(self.seconds(step))
        return row


def none_for_nan(value: float) -> float | None:
    """The value, or None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def read_run(folder: Path, name: str) -> Run:
    """The log of the run in a folder. Raises ValueError if the folder does not hold the files of a run."""
    try:
        lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        recipe = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        block_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["block_size"]
        step_tokens = recipe["batch_size"] * recipe["gradient_accumulation_steps"] * block_size
        entries = [json.loads(line) for line in lines]
    except OSError as error:
        missing = Path(error.filename or folder).name
        raise ValueError(f"{folder} is not the folder of a run that has saved: {missing} cannot be read") from None
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        raise ValueError(f"{folder}: its history.jsonl, run.yaml or config.json is not what a run writes") from None
    run = Run(name, step_tokens)
    for entry in entries:
        step = entry["step"]
        if entry.get("loss") is not None:
            run.training.append((step, entry["loss"]))
        if entry.get("val_loss") is not None:  # null if it was not finite
            run.validation.append((step, entry["val_loss"]))
        if entry.get("tokens_per_second"):
            last, seconds = run.clock[-1]
            run.clock.append((step, seconds + (step - last) * step_tokens / entry["tokens_per_second"]))
    if not run.training and not run.validation:
        raise ValueError(f"{folder}: its history.jsonl holds no loss yet: compare it after its first evaluation")
    return run


def names_of(folders: list[str]) -> list[str]:
    """The name of each run: the name of its folder, or the whole path if two folders have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [str(Path(folder)) for folder in folders]


def draw(path: str, runs: list[Run], loss: float) -> None:
    """Draw two panels: the losses over the tokens trained on, and over the seconds of training.

    The scale fits the losses after the first tenth of each run: with the first losses, the others would look flat.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    shown = [loss] if loss else []
    for number, run in enumerate(runs):
        look = {"color": f"C{number}"}
        for points, style in (
            (run.training, {"linewidth": 0.8, "alpha": 0.35}),
            (run.validation, {"linewidth": 1.6, "marker": "o", "markersize": 3, "label": run.name}),
        ):
            shown += [value for step, value in points if step >= run.steps / 10]
            losses = [value for _, value in points]
            by_tokens.plot([step * run.step_tokens for step, _ in points], losses, **look, **style)
            by_seconds.plot([run.seconds(step) for step, _ in points], losses, **look, **style)
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    by_tokens.set_ylim(min(shown) - margin, max(shown) + margin)
    for axes, label in ((by_tokens, "tokens trained on"), (by_seconds, "seconds of training")):
        if loss:
            axes.axhline(loss, color="gray", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_tokens.set_ylabel("loss (nats a token)")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_tokens.legend(frameon=False, title="validation; thin: training, as logged")
    figure.savefig(path)


def show(rows: list[dict]) -> None:
    """Print rows as a table with a line for each run."""
    cells = [[cell_text(value) for value in row.values()] for row in rows]
    table = [list(rows[0]), *cells]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        first = line[0].ljust(widths[0])
        print("  ".join([first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]))


def cell_text(value) -> str:
    """A value of the table as text. A loss has four digits after the point, seconds and steps have one."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value < 20 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def main() -> None:
    arguments: argparse.Namespace = parser.parse(sys.argv[1:])
    parser.check_picture("--plot", arguments.plot)
    try:
        names = names_of(arguments.out_dirs)
        runs = [read_run(Path(folder), name) for folder, name in zip(arguments.out_dirs, names, strict=True)]
    except ValueError as mistake:
        parser.error(str(mistake))
    try:
        draw(arguments.plot, runs, arguments.loss)
    except OSError as error:
        parser.error(f"--plot={arguments.plot} cannot be written: {error.strerror}")
    rows = [run.summary(arguments.loss) for run in runs]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
        print(f"drawn in {arguments.plot}", file=sys.stderr)


if __name__ == "__main__":
    begin_command(parser.prog)
    main()
