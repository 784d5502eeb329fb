"""Train five sizes of GPT, each with three numbers of FLOPs, on Python's standard library, and fit how the loss falls.

    python docs/scaling.py docs/scaling.jsonl docs/scaling.png     do the missing runs, print the tables, draw

This is a small version of Chinchilla's approach 2 (arXiv 2203.15556): of all sizes that were trained with equal FLOPs,
which is the best one? A finished run is a line in the file, and is not repeated. Each run is the quickstart's, with
another shape and length.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modeling_nanogpt import NanoGPTConfig
from modeling_nanogpt.throughput import flops_per_token

ROOT = Path(__file__).parent.parent
SHAPES = [(1, 32), (2, 48), (2, 64), (3, 96), (4, 128)]  # layers and width; a head is 32 or 48 wide
BUDGETS = [2e11, 5e11, 1.25e12]  # FLOPs of a run
STEP_TOKENS = 8 * 128  # the quickstart's windows in a step, times tokens in a window
VOCAB, CONTEXT = 1024, 128


def train(layers: int, width: int, budget: float, folder: Path) -> dict:
    """Train one shape with so many FLOPs. Returns its size, its tokens, and its loss (nats a token) at the end."""
    heads = max(width // 32, 1)
    config = NanoGPTConfig(vocab_size=VOCAB, block_size=CONTEXT, n_layer=layers, n_head=heads, n_embd=width)
    step_flops = STEP_TOKENS * flops_per_token(config)
    steps = round(budget / step_flops)
    flags = {key: getattr(config, key) for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
    flags |= {"max_iters": steps, "eval_interval": steps, "eval_tokens": 131_072, "windows": "epoch"}
    flags |= {"data_dir": ROOT / "data" / "scaling", "out_dir": folder / f"{layers}x{width}-{budget:.0e}"}
    command = [sys.executable, "train_accelerate.py", "hub_configs/quickstart.yaml"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in flags.items())], cwd=ROOT, check=True)
    lines = (flags["out_dir"] / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "shape": [layers, width],
        "parameters": 12 * layers * width**2,  # of the blocks
        "budget": budget,
        "flops": steps * step_flops,
        "tokens": steps * STEP_TOKENS,
        "loss": json.loads(lines[-1])["val_loss"],
    }


def fit_power(x: list[float], y: list[float]) -> tuple[float, float]:
    """Exponent and factor of y = factor * x ** exponent, by least squares in logarithms."""
    exponent, logarithm = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(np.exp(logarithm))


def lowest_point(runs: list[dict]) -> tuple[float, float, np.ndarray]:
    """The size and the loss at the lowest point of a parabola, and the parabola's coefficients, highest power first.

    The parabola is fitted to the losses (nats a token) over the logarithm of the size (parameters).
    """
    parabola = np.polyfit(np.log([run["parameters"] for run in runs]), [run["loss"] for run in runs], 2)
    a, b, c = parabola
    return float(np.exp(-b / (2 * a))), float(c - b * b / (4 * a)), parabola


def do_missing_runs(path: Path) -> list[dict]:
    """Do the runs that the file does not have, and add them to it. Returns all runs, by size."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(*run["shape"], run["budget"]) for run in done}
    with tempfile.TemporaryDirectory() as folder:
        for layers, width in SHAPES:
            for budget in BUDGETS:
                if (layers, width, budget) in known:
                    continue
                done.append(train(layers, width, budget, Path(folder)))
                with open(path, "a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    return sorted(done, key=lambda run: run["parameters"])


def main() -> None:
    runs = do_missing_runs(Path(sys.argv[1]))
    by_budget = [[run for run in runs if run["budget"] == budget] for budget in BUDGETS]
    print("| parameters of the blocks | " + " | ".join(f"{budget:.3g} FLOPs" for budget in BUDGETS) + " |")
    print("| --- " * (1 + len(BUDGETS)) + "|")
    for of_shape in zip(*by_budget, strict=True):
        layers, width = of_shape[0]["shape"]
        cells = [f"{run['loss']:.3f} ({run['tokens'] / 1e6:.2f}M tokens)" for run in of_shape]
        print(f"| {of_shape[0]['parameters']:,} ({layers} x {width}) | " + " | ".join(cells) + " |")

    sizes, losses, parabolas = zip(*map(lowest_point, by_budget), strict=True)
    for budget, size, loss in zip(BUDGETS, sizes, losses, strict=True):
        print(f"{budget:.3g} FLOPs: the best size is {size:,.0f} parameters, with a loss of {loss:.3f}")
    exponent, factor = fit_power(BUDGETS, losses)
    print(f"lowest loss = {factor:.3g} * FLOPs ** {exponent:.4f}")
    size_exponent, size_factor = fit_power(BUDGETS, sizes)
    print(f"best size = {size_factor:.3g} * FLOPs ** {size_exponent:.2f}")

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_flops, by_size = figure.subplots(1, 2, sharey=True)
    for number, of_shape in enumerate(zip(*by_budget, strict=True)):
        points = [(run["flops"], run["loss"]) for run in of_shape]
        by_flops.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=f"{of_shape[0]['parameters']:,}")
    line = np.geomspace(BUDGETS[0], BUDGETS[-1])
    by_flops.plot(line, factor * line**exponent, "k--", label=f"lowest: {factor:.3g} · FLOPs^{exponent:.3f}")
    by_flops.set(xlabel="training FLOPs", ylabel="loss on 131,072 held-out tokens, nats a token")
    by_flops.legend(title="parameters of the blocks", frameon=False)
    around = np.geomspace(runs[0]["parameters"] / 1.3, runs[-1]["parameters"] * 1.3)
    for number, (of_budget, parabola) in enumerate(zip(by_budget, parabolas, strict=True)):
        color = f"C{number}"
        points = [(run["parameters"], run["loss"]) for run in of_budget]
        by_size.plot(*zip(*points, strict=True), "o", color=color, label=f"{of_budget[0]['budget']:.3g}")
        by_size.plot(around, np.polyval(parabola, np.log(around)), color=color, linewidth=1)
    by_size.plot(sizes, losses, "k*", label="lowest points")
    by_size.set_xlabel("parameters of the blocks")
    by_size.legend(title="training FLOPs", frameon=False)
    for axes in (by_flops, by_size):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], dpi=80)


if __name__ == "__main__":
    main()
