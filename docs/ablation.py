"""Trains the fast recipe with one change at a time, over several seeds, and tells what each change does to the loss.

    python docs/ablation.py runs.jsonl cpu --corpus=tinyshakespeare.txt --seeds=4     run what is not there yet
    python docs/ablation.py runs.jsonl                                                 the tables of what is there

Every run is a line in the file: a run that was killed starts again, one that has finished does not.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a run for each core

import torch

import train_accelerate
from modeling_nanogpt import muon
from modeling_nanogpt.modeling_nanogpt import NanoGPTPreTrainedModel

# ---------------------------------------------------------------------------------------------------------------------
# What is compared: a base of flags, and by name the flags and patches that differ from it.

CPU = {
    "recipe": "hub_configs/shakespeare_char_cpu.yaml",
    "optimizer": "muon",
    "learning_rate": 8e-3,
    "lr_schedule": "linear",
    "min_lr": 0,
    "warmup_iters": 0,
    "max_iters": 500,
    "eval_interval": 100_000,
}
WIDE = CPU | {"corpus": "python-stdlib"}
BASES = {"cpu": CPU}


def around_step(wrapper):
    """A patch that puts a function around Muon's step."""

    def patch():
        step = muon.Muon.step
        muon.Muon.step = lambda self: wrapper(self, step)

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
    """Weight decay only where the update itself makes a weight smaller (Chen et al., 2510.12402)."""
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
            p.data.sub_(old * agrees, alpha=group["lr"] * muon.MATRIX_RATE * decay)


def row_norms(optimizer, step):
    """Each neuron's update divided by a running root mean square of its own (NorMuon, 2510.05491)."""
    weights = [p for group in optimizer.param_groups if group["parts"] for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    step(optimizer)
    for p, old in zip(weights, before, strict=True):
        update = p.detach() - old
        state = optimizer.state[p]
        square = update.square().mean(1, keepdim=True)
        state["square"] = state.get("square", torch.zeros_like(square)).lerp(square, 0.05)
        scaled = update / state["square"].sqrt().clamp(min=1e-10)
        p.data.copy_(old + scaled * (update.norm() / scaled.norm().clamp(min=1e-10)))
    del decays


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


def one_matrix():
    """q, k and v orthogonalised together, as the one matrix in which they lie."""
    groups = muon.muon_groups
    muon.muon_groups = lambda *args: [g | {"parts": min(g["parts"], 1)} for g in groups(*args)]


MINIMAX3 = ((8.2186, -23.72, 17.2185), (3.8835, -2.8413, 0.5331), (3.1681, -2.3329, 0.4775))  # from 0.005
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
VARIANTS = {
    "base": {},
    "adamw 4e-3, warmup 50": {"optimizer": "adamw", "warmup_iters": 50, "learning_rate": 4e-3},
    "16e-3 1.25": {"learning_rate": 16e-3, "patch": constant("MATRIX_RATE", 1.25)},
    "12e-3 1.67": {"learning_rate": 12e-3, "patch": constant("MATRIX_RATE", 1.67)},
    "8e-3 3.75": {"patch": constant("MATRIX_RATE", 3.75)},
    "12e-3 2.5": {"learning_rate": 12e-3},
    "16e-3 2.5": {"learning_rate": 16e-3},
    "8e-3 1.25": {"patch": constant("MATRIX_RATE", 1.25)},
    "4e-3 5": {"learning_rate": 4e-3, "patch": constant("MATRIX_RATE", 5.0)},
    "4e-3 2.5": {"learning_rate": 4e-3},
    "cosine to zero": {"lr_schedule": "cosine"},
    "wsd 0.4": {"lr_schedule": "wsd"},
    "wsd 0.7": {"lr_schedule": "wsd", "decay_fraction": 0.7},
    "warmup 50": {"warmup_iters": 50},
    "min_lr tenth": {"min_lr": 8e-4},
    "beta2 0.95": {"beta2": 0.95},
    "beta1 0.8": {"beta1": 0.8},
    "weight_decay 0": {"weight_decay": 0},
    "weight_decay 0.3": {"weight_decay": 0.3},
    "no clipping": {"grad_clip": 0},
    "five of Jordan's": {"patch": constant("COEFFICIENTS", JORDAN)},
    "minimax 3": {"patch": constant("COEFFICIENTS", MINIMAX3)},
    "momentum warmup": {"patch": momentum_warmup(100)},
    "momentum 0.9": {"patch": constant("MOMENTUM", 0.9)},
    "cautious decay": {"patch": around_step(cautious_decay)},
    "row norms": {"patch": around_step(row_norms)},
    "zero projections": {"patch": zero_projections},
    "qkv as one": {"patch": one_matrix},
}


# ---------------------------------------------------------------------------------------------------------------------
# Running


def train(job: tuple) -> dict:
    """One run in this process, which a patch may spoil for the next one. Returns its line."""
    base, variant, seed, flags, common = job
    torch.set_num_threads(1)
    flags = BASES[base] | common | VARIANTS[variant] | flags | {"seed": seed}
    flags.pop("patch", lambda: None)()
    evaluate = train_accelerate.evaluate
    train_accelerate.evaluate = lambda model, stream, tokens, *size: (
        math.nan if tokens else evaluate(model, stream, tokens, *size)  # of train nothing is evaluated
    )
    out_dir = tempfile.mkdtemp()
    recipe = flags.pop("recipe")
    train_accelerate.main([recipe, *(f"--{key}={value}" for key, value in flags.items()), f"--out_dir={out_dir}"])
    history = [json.loads(line) for line in (Path(out_dir) / "history.jsonl").read_text().splitlines()]
    shutil.rmtree(out_dir)
    curve = [[entry["step"], entry["val_loss"]] for entry in history if "val_loss" in entry]
    return {"base": base, "variant": variant, "seed": seed, "val_loss": curve[-1][1], "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("base", nargs="?", choices=BASES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2)
    args, common = parser.parse_known_args()
    done = [json.loads(line) for line in args.runs.read_text().splitlines()] if args.runs.exists() else []
    if args.base:
        there = {(run["base"], run["variant"], run["seed"]) for run in done}
        common = dict(flag.lstrip("-").split("=", 1) for flag in common)
        jobs = [(args.base, variant, seed, {}, common) for seed in range(1, args.seeds + 1) for variant in args.only]
        jobs = [job for job in jobs if job[:3] not in there]
        with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
            for run in pool.imap_unordered(train, jobs, chunksize=1):
                with args.runs.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                done.append(run)
    for base in BASES:
        print(f"\n| {base} | mean | deviation | seeds |\n| --- | --- | --- | --- |")
        for variant in VARIANTS:
            losses = [run["val_loss"] for run in done if (run["base"], run["variant"]) == (base, variant)]
            if losses:
                deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
                print(f"| {variant} | {statistics.mean(losses):.4f} | {deviation:.4f} | {len(losses)} |")


if __name__ == "__main__":
    main()
