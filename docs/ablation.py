"""Train the fast recipe with one change at a time, over several seeds, and show what each change does to the loss.

    python docs/ablation.py runs.jsonl cpu --seeds=4 --corpus=tinyshakespeare.txt     do the missing runs
    python docs/ablation.py runs.jsonl                                                show the runs in the file

A finished run is a line in the file, and is not repeated. A run that was killed has no line, and starts again. Changes
that differ in `average_decay` alone are lines of one run, as training does not know of the average.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_accelerate
from modeling_nanogpt import muon, optimization
from modeling_nanogpt.modeling_nanogpt import NanoGPTPreTrainedModel
from modeling_nanogpt.training.averaging import Average

# ---------------------------------------------------------------------------------------------------------------------
# What is compared: a base of flags, and under a name the flags and patches by which each variant differs from it.

FAST = {
    "optimizer": "muon",
    "learning_rate": 0.03,
    "lr_schedule": "linear",
    "min_lr": 0,
    "warmup_iters": 0,
    "beta1": 0.8,
    "momentum": 0.9,
    "eval_interval": 1_000_000,  # at the end only
}
# The recipe when the changes below were tried. Two of them, beta1 and momentum, are in FAST since then. AdamW's rate
# was 8 / sqrt(n_embd) times Muon's.
FIRST = FAST | {"beta1": 0.9, "momentum": 0.95}
CPU = {"recipe": "hub_configs/shakespeare_char_cpu.yaml", "dtype": "float32"}
WIDE = {
    "recipe": "hub_configs/quickstart.yaml",
    "n_layer": 6,
    "n_head": 4,
    "n_embd": 256,
    "dtype": "bfloat16",
    "max_iters": 200,
    "eval_tokens": 50_000,
}


def around_step(wrapper):
    """A patch that puts a function around Muon's step."""

    def patch():
        step = muon.Muon.step
        muon.Muon.step = lambda self, closure=None: wrapper(self, step)

    return patch


def momentum_warmup(steps):
    """Momentum from 0.85 to 0.95 over the first steps, as in modded-nanogpt's record 9."""

    def wrapper(optimizer, step):
        optimizer.steps_done = getattr(optimizer, "steps_done", 0) + 1
        for group in optimizer.param_groups:
            group["momentum"] = 0.85 + 0.1 * min(1, optimizer.steps_done / steps)
        step(optimizer)

    return around_step(wrapper)


def cautious_decay(optimizer, step):
    """Weight decay only of those weights that the update itself makes smaller (Chen et al., 2510.12402)."""
    groups = [group for group in optimizer.param_groups if group["parts"]]
    before = [[p.detach().clone() for p in group["params"]] for group in groups]
    decays = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    step(optimizer)
    for group, decay, weights in zip(groups, decays, before, strict=True):
        group["weight_decay"] = decay
        for p, old in zip(group["params"], weights, strict=True):
            agrees = (old - p.detach()) * old > 0
            p.data.sub_(old * agrees, alpha=group["lr"] * decay)


def row_norms(optimizer, step):
    """Each neuron's update, divided by the running root mean square of the neuron (NorMuon, 2510.05491)."""
    weights = [p for group in optimizer.param_groups if group["parts"] for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    step(optimizer)
    for p, old in zip(weights, before, strict=True):
        update, state = p.detach() - old, optimizer.state[p]
        square = update.square().mean(1, keepdim=True)
        state["square"] = state.get("square", torch.zeros_like(square)).lerp(square, 0.05)
        scaled = update / state["square"].sqrt().clamp(min=1e-10)
        p.data.copy_(old + scaled * (update.norm() / scaled.norm().clamp(min=1e-10)))


class LookAhead:
    """EMA-Nesterov (2605.25395): each step begins ahead of the weights, along an average of the earlier steps.

    The average m of steps has a decay of 0.99. A step begins at the weights + b m. Here b is `strength` times the
    learning rate's share of its peak, from a sixth of the run on to three quarters of it. Before and after, b is 0.
    """

    def __init__(self, strength: float, steps: int):
        self.strength, self.steps = strength, steps
        self.step, self.ahead, self.average = 0, 0.0, []

    def __call__(self, optimizer, step):
        weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        self.average = self.average or [torch.zeros_like(p) for p in weights]
        before = [p.clone() for p in weights]
        step(optimizer)
        change = torch._foreach_sub(weights, before)
        torch._foreach_add_(change, self.average, alpha=self.ahead)  # from the weights without the look-ahead
        torch._foreach_lerp_(self.average, change, 0.01)
        self.step += 1
        part = self.step / self.steps
        self.ahead = self.strength * (1 - part) if 0.16 <= part < 0.76 else 0.0
        torch._foreach_add_(weights, self.average, alpha=self.ahead)

    def patch(self):
        around_step(self)()


def zero_projections():
    """Residual projections start at zero: each block is the identity at first."""
    init_weights = NanoGPTPreTrainedModel._init_weights

    @torch.no_grad()
    def patched(self, module):
        init_weights(self, module)
        if getattr(module, "is_residual_projection", False):
            module.weight.zero_()

    NanoGPTPreTrainedModel._init_weights = patched


def constant(name, value):
    """A patch that gives one of muon.py's constants another value."""
    return lambda: setattr(muon, name, value)


def around_groups(change):
    """A patch that changes each of Muon's parameter groups."""

    def patch():
        groups = optimization.muon_groups
        optimization.muon_groups = lambda *args: [change(group) for group in groups(*args)]

    return patch


def table_rate(times):
    """A patch that multiplies the rate of the token embedding alone, which is also the head."""

    def patch():
        groups = optimization.muon_groups

        def patched(model, *args):
            table, changed = model.transformer.wte.weight, []
            for group in groups(model, *args):
                rest = [p for p in group["params"] if p is not table]
                changed.append(group | {"params": rest})
                if len(rest) < len(group["params"]):
                    changed.append(group | {"params": [table], "rate": times * group["rate"]})
            return changed

        optimization.muon_groups = patched

    return patch


def one_matrix(group):
    """q, k and v orthogonalised together, as the single matrix that holds them."""
    return group | {"parts": min(group["parts"], 1)}


def embeddings_stay(group):
    """No weight decay of embeddings and head."""
    return group if group["parts"] else group | {"weight_decay": 0.0}


def initial_size(std):
    """A patch that draws the initial weights with another standard deviation."""

    def patch():
        init_weights = NanoGPTPreTrainedModel._init_weights

        def patched(self, module):
            self.config.initializer_range = std
            init_weights(self, module)

        NanoGPTPreTrainedModel._init_weights = patched

    return patch


THREE = ((8.2186, -23.72, 17.2185), (3.8835, -2.8413, 0.5331), (3.1681, -2.3329, 0.4775))  # from 0.005
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
CHANGES = {
    "base": {},
    "AdamW at 2e-3": {"optimizer": "adamw", "warmup_iters": 50, "learning_rate": 2e-3},
    "AdamW at 4e-3": {"optimizer": "adamw", "warmup_iters": 50, "learning_rate": 4e-3},
    "AdamW at 8e-3": {"optimizer": "adamw", "warmup_iters": 50, "learning_rate": 8e-3},
    "learning_rate 0.01": {"learning_rate": 0.01},
    "learning_rate 0.02": {"learning_rate": 0.02},
    "learning_rate 0.04": {"learning_rate": 0.04},
    "learning_rate 0.06": {"learning_rate": 0.06},
    "AdamW at twice the rate": {"adamw_times": 2},
    "AdamW at half the rate": {"adamw_times": 0.5},
    "cosine to zero": {"lr_schedule": "cosine"},
    "linear to a tenth": {"min_lr": 0.003},
    "wsd, decay_fraction 0.4": {"lr_schedule": "wsd"},
    "wsd, decay_fraction 0.7": {"lr_schedule": "wsd", "decay_fraction": 0.7},
    "warmup of 50 steps": {"warmup_iters": 50},
    "beta2 0.95": {"beta2": 0.95},
    "beta1 0.8": {"beta1": 0.8},
    "beta1 0.7": {"beta1": 0.7},
    "beta1 0.9, momentum 0.85": {"momentum": 0.85},
    "beta1 0.85, momentum 0.85": {"beta1": 0.85, "momentum": 0.85},
    "beta1 0.8, momentum 0.85": {"beta1": 0.8, "momentum": 0.85},
    "beta1 0.8, momentum 0.9": {"beta1": 0.8, "momentum": 0.9},
    "beta1 0.7, momentum 0.9": {"beta1": 0.7, "momentum": 0.9},
    "beta1 0.8, three iterations": {"beta1": 0.8, "patch": constant("COEFFICIENTS", THREE)},
    "weight_decay 0": {"weight_decay": 0},
    "weight_decay 0.3": {"weight_decay": 0.3},
    "no clipping": {"grad_clip": 0},
    "three iterations": {"patch": constant("COEFFICIENTS", THREE)},
    "Jordan's five": {"patch": constant("COEFFICIENTS", JORDAN)},
    "momentum 0.9": {"momentum": 0.9},
    "momentum 0.98": {"momentum": 0.98},
    "momentum warmup": {"patch": momentum_warmup(100)},
    "cautious decay": {"patch": around_step(cautious_decay)},
    "row norms": {"patch": around_step(row_norms)},
    "zero projections": {"patch": zero_projections},
    "initial weights of 0.01": {"patch": initial_size(0.01)},
    "initial weights of 0.04": {"patch": initial_size(0.04)},
    "initial weights of 0.08": {"patch": initial_size(0.08)},
    "q, k and v as one": {"patch": around_groups(one_matrix)},
    "embeddings without decay": {"patch": around_groups(embeddings_stay)},
    "steps of sqrt(rows / columns)": {"patch": constant("max", lambda one, ratio: ratio)},
    "epoch windows": {"windows": "epoch"},
}
KNOBS = {
    "base": {},
    "momentum 0.95, warmup and cooldown of 300": {
        "momentum": 0.95,
        "momentum_warmup_iters": 300,
        "momentum_cooldown_iters": 300,
    },
    "momentum cooldown of 300": {"momentum_cooldown_iters": 300},
    "linear to a tenth": {"min_lr": 0.003},
    "muon_weight_decay 0.03": {"muon_weight_decay": 0.03},
    "muon_weight_decay 0.3": {"muon_weight_decay": 0.3},
    "average_decay 0.9": {"average_decay": 0.9},
    "average_decay 0.95": {"average_decay": 0.95},
    "average_decay 0.98": {"average_decay": 0.98},
    "average_decay 0.99": {"average_decay": 0.99},
    "average_decay 0.995": {"average_decay": 0.995},
    "linear to a tenth, average_decay 0.9": {"min_lr": 0.003, "average_decay": 0.9},
    "linear to a tenth, average_decay 0.95": {"min_lr": 0.003, "average_decay": 0.95},
    "linear to a tenth, average_decay 0.98": {"min_lr": 0.003, "average_decay": 0.98},
    "linear to a tenth, average_decay 0.99": {"min_lr": 0.003, "average_decay": 0.99},
    "linear to a tenth, average_decay 0.995": {"min_lr": 0.003, "average_decay": 0.995},
    "look-ahead of 0.6": {"patch": LookAhead(0.6, steps=2000).patch},
}
AVERAGES = {
    "base": {},
    "linear to a tenth": {"min_lr": 0.003},
    "linear to a tenth, average_decay 0.9": {"min_lr": 0.003, "average_decay": 0.9},
    "linear to a tenth, average_decay 0.95": {"min_lr": 0.003, "average_decay": 0.95},
    "linear to a tenth, average_decay 0.98": {"min_lr": 0.003, "average_decay": 0.98},
    "linear to a tenth, average_decay 0.99": {"min_lr": 0.003, "average_decay": 0.99},
    "constant": {"lr_schedule": "constant"},
    "constant, average_decay 0.9": {"lr_schedule": "constant", "average_decay": 0.9},
    "constant, average_decay 0.95": {"lr_schedule": "constant", "average_decay": 0.95},
    "constant, average_decay 0.98": {"lr_schedule": "constant", "average_decay": 0.98},
    "constant, average_decay 0.99": {"lr_schedule": "constant", "average_decay": 0.99},
}
WIDTHS = {
    f"{width} wide, learning_rate {rate}{said}": {"n_embd": width, "learning_rate": rate, "adamw_times": times}
    for width in (64, 256, 512)
    for rate, said, times in (
        (0.015, "", 1),
        (0.03, "", 1),
        (0.06, "", 1),
        (0.03, ", AdamW at half the rate", 0.5),
        (0.03, ", AdamW at twice the rate", 2),
        (0.03, ", AdamW at 8 / sqrt(n_embd)", 0.08 * width**0.5),
    )
}
RATES = {
    f"{width} wide, learning_rate 0.03{said}": {"n_embd": width, "adamw_times": times}
    for width in (64, 128, 256, 512, 768)
    for said, times in (
        (", AdamW at a quarter of the rate", 0.25),
        (", AdamW at half the rate", 0.5),
        ("", 1),
        (", AdamW at twice the rate", 2),
        (", AdamW at four times the rate", 4),
    )
}
TABLES = {
    f"{width} wide, learning_rate 0.03{said}": {"n_embd": width, "patch": table_rate(table), "adamw_times": times}
    for width in (128, 256)
    for said, table, times in (
        (", embedding at twice the rate", 2, 1),
        (", embedding at four times the rate", 4, 1),
        (", all but the embedding at twice the rate", 0.5, 2),
        (", all but the embedding at four times the rate", 0.25, 4),
    )
}
RECIPES = {
    "nanoGPT's": {"eval_interval": 100},
    "nanoGPT's, bfloat16": {"eval_interval": 100, "dtype": "bfloat16"},
    "fast": FAST | {"eval_interval": 200},
    "fast, bfloat16": FAST | {"eval_interval": 200, "dtype": "bfloat16"},
    "fast, 450 steps": FAST | {"max_iters": 450, "eval_interval": 50},
    "fast, AdamW at 8 / sqrt(n_embd)": FAST | {"eval_interval": 200, "adamw_rate": 8 * 128**0.5},
    "the same, momentum 0.95": FAST | {"eval_interval": 400, "adamw_rate": 8 * 128**0.5, "momentum": 0.95},
}
STUDIES = {
    "cpu": (FIRST | CPU | {"max_iters": 450, "adamw_rate": 8 * 128**0.5}, CHANGES),
    "widths": (FAST | CPU | {"max_iters": 300, "dtype": "bfloat16"}, WIDTHS),
    "shallow": (FAST | CPU | {"max_iters": 300, "dtype": "bfloat16", "n_layer": 2}, RATES),
    "shallow_bpe": (WIDE | FAST | {"max_iters": 300, "n_layer": 2}, RATES | TABLES),
    "wide": (WIDE | FIRST | {"adamw_rate": 8 * 256**0.5}, CHANGES),
    "quickstart": (
        {"recipe": "hub_configs/quickstart.yaml"},
        {"base": {}, "AdamW at twice the rate": {"adamw_times": 2}},
    ),
    "recipes": (CPU, RECIPES),
    "knobs": (FAST | CPU | {"max_iters": 2000}, KNOBS),
    "averages": (FAST | CPU | {"max_iters": 450}, AVERAGES),
    "wide_knobs": (WIDE | FAST | {"max_iters": 2000, "batch_size": 4}, KNOBS),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Averages:
    """Several averages of the weights of one run. The optimizer calls it after each step."""

    def __init__(self, decays: list[float]):
        self.decays, self.steps, self.averages = decays, 0, list[Average]()

    def __call__(self, optimizer, *arguments, **named):
        if not self.averages:  # after its first step, an average is the weights of this step
            weights = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
            self.averages = [Average(weights, decay) for decay in self.decays]
        for average in self.averages:
            average.update(self.steps, skip=torch.zeros(()))
        self.steps += 1


def train(job: tuple) -> list[dict]:
    """Do one run and return its lines. A patch may change this process, so each run needs a process of its own."""
    study, variants, seed, common, threads = job  # variants of one run, which differ in average_decay alone
    torch.set_num_threads(threads)
    base, changes = STUDIES[study]
    flags = base | changes[variants[0]] | common | {"seed": seed}
    optimization.ADAMW_RATE = flags.pop("adamw_rate", optimization.ADAMW_RATE) * flags.pop("adamw_times", 1)
    flags.pop("patch", lambda: None)()
    flags.pop("average_decay", None)
    averages = Averages([changes[variant].get("average_decay", 0.0) for variant in variants])
    register_optimizer_step_post_hook(averages)
    evaluate, calls, val_losses = train_accelerate.evaluate, itertools.count(), {variant: [] for variant in variants}

    def evaluate_val(*args, **size):
        call = next(calls)  # val and train take turns; only val is needed, and not at the start of the run
        if call == 0 or call % 2:
            return math.nan
        for variant, average in zip(variants, averages.averages, strict=True):
            with average.in_model():  # which is the model itself if the decay is 0
                loss = evaluate(*args, **size)
                val_losses[variant].append([averages.steps, loss])
        return loss

    train_accelerate.evaluate = evaluate_val
    out_dir = tempfile.mkdtemp()
    recipe = flags.pop("recipe")
    arguments = [recipe, *(f"--{key}={value}" for key, value in flags.items()), f"--out_dir={out_dir}"]
    train_accelerate.main(*train_accelerate.parse_arguments(arguments))
    history = [json.loads(line) for line in (Path(out_dir) / "history.jsonl").read_text().splitlines()]
    resolved = yaml.safe_load((Path(out_dir) / "run.yaml").read_text())
    shutil.rmtree(out_dir)
    tokens = math.prod(resolved[key] for key in ("gradient_accumulation_steps", "batch_size", "block_size"))
    run = {
        "seed": seed,
        "tokens_per_step": tokens,
        "ms_per_step": 1000 * statistics.median(tokens / e["tokens_per_second"] for e in history if "loss" in e),
    }
    return [{"study": study, "variant": variant, **run, "val_losses": val_losses[variant]} for variant in variants]


def runs_of(study: str, variants: list[str]) -> list[list[str]]:
    """Variants in groups, of which each takes one run: they differ in average_decay alone."""
    changes = STUDIES[study][1]
    groups: list[list[str]] = []
    for variant in variants:
        flags = changes[variant] | {"average_decay": 0}
        alike = [group for group in groups if changes[group[0]] | {"average_decay": 0} == flags]
        if alike:
            alike[0].append(variant)
        else:
            groups.append([variant])
    return groups


def mean_and_deviation(numbers: list[float]) -> tuple[float, float]:
    """The mean of some numbers, and their standard deviation."""
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def show(study: str, done: list[dict]) -> None:
    """Print a table of last losses, and beside each the mean difference from `base`, seed by seed, with its error."""
    losses = {variant: {} for variant in STUDIES[study][1]}
    for run in done:
        if run["study"] == study and run["variant"] in losses:
            losses[run["variant"]][run["seed"]] = run["val_losses"][-1][1]
    print(f"\n| {study} | loss | deviation | seeds | less base | its error |\n| --- | --- | --- | --- | --- | --- |")
    for variant, by_seed in losses.items():
        if not by_seed:
            continue
        mean, deviation = mean_and_deviation(list(by_seed.values()))
        line = f"| {variant} | {mean:.4f} | {deviation:.4f} | {len(by_seed)} |"
        base = losses.get("base", {})
        differences = [loss - base[seed] for seed, loss in by_seed.items() if seed in base]
        if differences and variant != "base":
            mean, deviation = mean_and_deviation(differences)
            line += f" {mean:+.4f} | {deviation / math.sqrt(len(differences)):.4f} |"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    args, common = parser.parse_known_args()
    done = [json.loads(line) for line in args.runs.read_text().splitlines()] if args.runs.exists() else []
    if args.study:
        there = {(run["study"], run["variant"], run["seed"]) for run in done}
        common = dict(flag.lstrip("-").split("=", 1) for flag in common)
        variants = args.only or STUDIES[args.study][1]
        threads = os.cpu_count() // args.jobs
        jobs = []
        for seed in range(1, args.seeds + 1):
            missing = [variant for variant in variants if (args.study, variant, seed) not in there]
            jobs += [(args.study, group, seed, common, threads) for group in runs_of(args.study, missing)]
        with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
            for runs in pool.imap_unordered(train, jobs, chunksize=1):
                with args.runs.open("a") as file:
                    file.writelines(json.dumps(run) + "\n" for run in runs)
                done += runs
    for study in STUDIES:
        show(study, done)


if __name__ == "__main__":
    main()
