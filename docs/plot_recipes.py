"""Draw validation loss against tokens and against seconds, from the lines that ablation.py wrote for `recipes`.

    python docs/plot_recipes.py docs/fast_recipe.jsonl docs/fast_recipe.png

Seconds are steps times the median time of a step, so they do not include evaluation and saving.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

TARGET = 1.898  # nats: the loss at the end of a run of nanoGPT's recipe
VARIANTS = ("nanoGPT's", "fast", "fast, 450 steps")
TIMED = {"fast": "fast, 450 steps"}  # the same step, but these runs had the machine to themselves


def crossing(curve: list[list[float]]) -> float:
    """The step at which a curve of (step, loss) first passes the target, on the line between two evaluations."""
    for (step, loss), (next_step, next_loss) in zip(curve, curve[1:], strict=False):
        if next_loss <= TARGET:
            return step + (next_step - step) * (loss - TARGET) / (loss - next_loss)
    return float("nan")


def main() -> None:
    runs = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    runs = [run for run in runs if run["study"] == "recipes"]
    for number, variant in enumerate(VARIANTS):
        mine = [run for run in runs if run["variant"] == variant]
        times = [run["ms_per_step"] for run in runs if run["variant"] == TIMED.get(variant, variant)]
        ms = statistics.median(times)
        crossed = [crossing(run["val_losses"]) for run in mine]
        last = [run["val_losses"][-1][1] for run in mine]
        for seed, run in enumerate(mine):
            steps, losses = zip(*run["val_losses"], strict=True)
            look = {"color": f"C{number}", "linewidth": 1, "label": variant if seed == 0 else None}
            by_tokens.plot([step * run["tokens_per_step"] / 1e6 for step in steps], losses, **look)
            by_seconds.plot([step * ms / 1e3 for step in steps], losses, **look)
        print(
            f"{variant}: {ms:.1f} ms a step ({', '.join(f'{time:.1f}' for time in times)}); passes {TARGET} at step "
            f"{', '.join(f'{step:.0f}' for step in crossed)} (mean {statistics.mean(crossed):.0f}, "
            f"{statistics.mean(crossed) * ms / 1e3:.1f} s); ends at {', '.join(f'{loss:.4f}' for loss in last)} "
            f"(mean {statistics.mean(last):.4f}, deviation {statistics.stdev(last):.4f})"
        )
    for axes, unit in ((by_tokens, "million tokens"), (by_seconds, "seconds on two CPU cores")):
        axes.axhline(TARGET, color="gray", linewidth=0.8, linestyle="--")
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    by_tokens.set_ylim(1.5, 2.8)
    by_tokens.set_ylabel("loss on the whole validation split, nats")
    by_tokens.legend()
    figure.savefig(sys.argv[2], dpi=80)


if __name__ == "__main__":
    main()
