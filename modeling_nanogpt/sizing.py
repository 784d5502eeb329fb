"""Say how large a model is, whether its training fits into memory, and how long the training takes.

    python -m modeling_nanogpt.sizing hub_configs/gpt2_124m.yaml --memory 24GiB --gpu "RTX 4090"
    python -m modeling_nanogpt.sizing out/quickstart --batch_size=64 --plot sizing.png
    python -m modeling_nanogpt.sizing hub_configs/gpt2_124m.yaml --n_layer=24 --n_head=16 --n_embd=1024 --gpus=8

The model comes from a recipe, a folder, a Hub id or nanoGPT's ckpt.pt. The command downloads only a config.json, and
does not read weights. Flags of the trainer win over the recipe. Memory is the bytes of tensors in eager PyTorch, by
formulas that the tests compare with measurements. docs/sizing.md says what is counted.
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from command_start import begin_command

from .command_line import CommandParser
from .gpus import PEAK_FLOPS, peak_of
from .plan import GPT2_SHAPES, GPT2_TOKENS, Plan, find_recipe, read_recipe, read_value, vocabulary_of

HELP = {
    "tokenizer": "tokenizer of a new model",
    "vocab_size": "tokens of the vocabulary; a new model has the next multiple of 64",
    "block_size": "longest context, in tokens",
    "n_layer": "number of blocks",
    "n_head": "attention heads in a block",
    "n_embd": "width of the residual stream",
    "bias": "biases in linear layers and layer norms",
    "batch_size": "windows in a micro-batch",
    "gradient_accumulation_steps": "micro-batches in a step, over all GPUs together",
    "max_iters": "optimizer steps of the whole run",
    "optimizer": "adamw or muon",
    "dtype": "arithmetic; auto is counted as bfloat16, as on a GPU",
    "gradient_checkpointing": "compute activations twice: less memory, more time",
    "attn_implementation": "attention function: eager and plain keep all scores in memory, and any other does not",
}
UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
FREE = 0.1  # part of a GPU's memory that is left free for the CUDA process itself, and for fragments

parser = CommandParser("modeling_nanogpt.sizing", usage="RECIPE|MODEL [--flag VALUE ...]", description=__doc__)
parser.add_path("subject", metavar="RECIPE|MODEL", help="recipe (a .yaml file), or folder or Hub id of a model")
parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")
parser.add_argument(
    "--memory", metavar="SIZE", default="24GiB", help="memory of a GPU, such as 24GiB or 80GB (default: 24GiB)"
)
parser.add_argument("--gpu", metavar="NAME", default="A100", help="GPU to train on, such as H100 (default: A100)")
parser.add_number("--gpus", 1, "number of these GPUs", at_least=1)
# nanoGPT's notebook transformer_sizing measured 37 % for a GPT-2 of 124M parameters on an A100
parser.add_number("--mfu", 0.37, "part of the GPU's FLOP/s that training uses", below=1)
parser.add_number("--flops", 0.0, "training FLOPs to find the best size for; 0: those of the run, 6 N D")
parser.add_path("--plot", metavar="FILE", help="picture to draw, a .png, .svg or .pdf")
parser.add_argument("--json", action="store_true", help="print the results as JSON, in bytes and FLOPs")
group = parser.add_argument_group("flags of the trainer, which win over the recipe")
for flag, text in HELP.items():
    group.add_argument(f"--{flag}", metavar="VALUE", help=text)


def parse_arguments() -> argparse.Namespace:
    """The command line, with the plan of the recipe as `plan` and bytes as `memory`. A mistake ends the process."""
    arguments = parser.parse(sys.argv[1:])
    given_memory = arguments.memory
    size = re.fullmatch(r"([\d.]+) ?(GiB|MiB|GB|MB)", given_memory)
    try:
        arguments.memory = float(size[1]) * UNITS[size[2]] if size else 0
    except ValueError:
        arguments.memory = 0
    if not arguments.memory:
        parser.error(f"--memory={given_memory}, but it must be a size such as 24GiB, 80GB or 512MiB")
    arguments.peak = peak_of(arguments.gpu)
    if arguments.peak is None:
        parser.error(f"--gpu={arguments.gpu} is not known, but it must be one of {', '.join(PEAK_FLOPS)}")
    if not arguments.mfu:
        parser.error("--mfu=0.0, but it must be above 0: 0.4 is good for a small model")
    if arguments.plot:
        parser.check_picture("--plot", arguments.plot)
    changes = {flag: getattr(arguments, flag) for flag in HELP if getattr(arguments, flag) is not None}
    try:
        arguments.plan = make_plan(arguments.subject, changes)
    except ValueError as mistake:
        parser.error(str(mistake))
    if arguments.plan.gradient_accumulation_steps % arguments.gpus:
        parser.error(
            f"gradient_accumulation_steps={arguments.plan.gradient_accumulation_steps} counts the micro-batches of "
            f"all GPUs, so it must be divisible by their number, --gpus={arguments.gpus}"
        )
    return arguments


def is_recipe(subject: str) -> bool:
    return subject.endswith((".yaml", ".yml"))


def make_plan(subject: str, changes: dict[str, str]) -> Plan:
    """The plan of a recipe, or of the run that wrote the folder of a model. `changes` are flags that win over it.

    Raises ValueError if the recipe cannot be read, or if a flag has a wrong value or is not for a trained model.
    """
    if is_recipe(subject):
        return read_recipe(find_recipe(subject), changes)
    for flag in ("n_layer", "n_head", "n_embd", "bias", "vocab_size"):
        if flag in changes:
            raise ValueError(f"--{flag} is for a recipe, but the weights of {subject} have their shape: leave it out")
    recipe_of_run = Path(subject) / "run.yaml"
    if recipe_of_run.is_file():
        return read_recipe(recipe_of_run, changes)
    return Plan(**{key: read_value(key, value) for key, value in changes.items()})


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

from transformers.utils import logging

from .configuration_nanogpt import NanoGPTConfig
from .memory import TrainingMemory, largest_batch, optimizer_bytes, parameters_by_part, training_memory
from .scaling_laws import CORRECTED, PUBLISHED, TABLE_A3, tokens_by_table
from .sources import choose_config, open_source
from .throughput import flops_per_token, forward_flops

FITS = {"published fit": PUBLISHED, "corrected fit": CORRECTED}


def find_config(subject: str, revision: str | None, plan: Plan) -> tuple[NanoGPTConfig, int, str]:
    """The shape of the model, its number of tokens without padding, and where this number comes from.

    Raises ValueError if there is no model, or if the number of tokens is not known.
    """
    if not is_recipe(subject):
        block_size = {"block_size": plan.block_size} if plan.block_size else {}
        config = config_of_model(subject, revision, block_size)
        return config, config.vocab_size, "as the model has it"
    if plan.init_from not in ("scratch", "resume"):
        config = config_of_model(plan.init_from, plan.revision, plan.shape)
        return config, config.vocab_size, f"as {plan.init_from} has it"
    tokens, known = vocabulary_of(plan, Path(subject).stem)
    rows = math.ceil(tokens / 64) * 64  # as in the trainer: a multiple of 64 is faster
    return choose_config(plan.shape | {"vocab_size": rows}, None), tokens, known


def config_of_model(name: str, revision: str | None, changes: dict) -> NanoGPTConfig:
    """The shape of a trained model, with another dropout or a smaller block_size.

    Raises ValueError if there is no model, or if `changes` (keys of NanoGPTConfig) contradict it.
    """
    shape = GPT2_SHAPES.get(name.removeprefix("openai-community/"))
    if shape is None or Path(name).exists():
        return choose_config(changes, open_source(name, revision))
    layers, heads, width = shape
    theirs = {"n_layer": layers, "n_head": heads, "n_embd": width, "vocab_size": GPT2_TOKENS, "bias": True}
    return NanoGPTConfig(**changes | theirs)


def measure(config: NanoGPTConfig, plan: Plan, *, memory: float, peak: float, gpus: int, mfu: float, flops: float):
    """All results, by name. Their units are in the names.

    `memory` is the memory of a GPU in bytes, and `peak` its FLOP/s. `mfu` is the part of `peak` that training uses.
    `flops` are training FLOPs to find the best size for; 0 takes those of the run.
    """
    parts = parameters_by_part(config)
    forward = forward_flops(config)
    parameters = sum(parts.values())
    moments = optimizer_bytes(config, plan.optimizer)
    settings: dict[str, Any] = {
        "config": config,
        "optimizer": plan.optimizer,
        "dtype": "bfloat16" if plan.dtype == "auto" else plan.dtype,
        "keeps_gradients": gpus > 1 or plan.gradient_accumulation_steps > gpus,
        "attention": plan.attn_implementation,
    }
    fitting = {}
    for name, checkpoints in (("without checkpointing", False), ("with checkpointing", True)):
        # With the largest micro-batch, a step may still have several. Then gradients are kept from one to the next.
        held = settings | {"gradient_checkpointing": checkpoints, "keeps_gradients": True}
        largest = largest_batch(memory * (1 - FREE), **held)
        share = plan.windows // gpus
        divisor = next((size for size in range(min(largest, share), 0, -1) if share % size == 0), 0)
        now = settings | {"gradient_checkpointing": checkpoints}
        fitting[name] = {
            "memory": training_memory(batch_size=plan.batch_size, **now),
            "largest micro-batch": largest,
            "largest divisor of a step": divisor,
        }
    step_tokens = plan.windows * config.block_size
    tokens = plan.max_iters * step_tokens
    rate = gpus * mfu * peak / flops_per_token(config)
    run_flops = tokens * flops_per_token(config)
    budget = flops or 6 * parameters * tokens
    return {
        "parameters": parameters,
        "parameters by part": parts,
        "FLOPs of the forward pass, a token": forward,
        "FLOPs of a token": flops_per_token(config),
        "FLOPs of a step": step_tokens * flops_per_token(config),
        "FLOPs of the run": run_flops,
        "bytes of model.safetensors": 4 * parameters,
        "bytes of a checkpoint": 4 * parameters + moments,
        "fitting": fitting,
        "settings": settings,
        "tokens of a step": step_tokens,
        "tokens of the run": tokens,
        "tokens a second": rate,
        "seconds of a step": step_tokens / rate,
        "hours of the run": tokens / rate / 3600,
        "Chinchilla": {
            "FLOPs": budget,
            "best tokens by table A3": tokens_by_table(parameters),
            "best tokens by the published fit": PUBLISHED.best_tokens(parameters),
            "best tokens by the corrected fit": CORRECTED.best_tokens(parameters),
            "best parameters and tokens by the published fit": PUBLISHED.best_size(budget),
            "best parameters and tokens by the corrected fit": CORRECTED.best_size(budget),
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def gib(count: float) -> str:
    """Bytes as text in GiB, or in MiB below a tenth of a GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def short(count: float) -> str:
    """A large number in three digits and a letter, as 124M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def show(results: dict, config: NanoGPTConfig, tokens: int, known: str, arguments: argparse.Namespace) -> None:
    """Print the report. `tokens` are those of the vocabulary, and `known` says where this number comes from."""
    plan, parameters = arguments.plan, results["parameters"]
    print(
        f"{arguments.subject}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context "
        f"{config.block_size:,}\nvocabulary: {tokens:,} tokens, {known}; the model has {config.vocab_size:,}\n"
    )
    print(f"{'parameters':24}{parameters:>17,}")
    for part, count in results["parameters by part"].items():
        layers = f"{config.n_layer} x " if part.startswith(("ln_1", "attn", "ln_2", "mlp")) else ""
        note = "  the same as wte" if part == "lm_head" and not count else f"{count / parameters:7.1%}"
        print(f"  {layers + part:22}{count:>17,}{note}")
    if padding := config.vocab_size - tokens:
        print(f"  {'without padding':22}{parameters - padding * config.n_embd:>17,}  of the vocabulary")
    print(f"  {'without positions':22}{parameters - results['parameters by part']['wpe']:>17,}\n")

    forward = results["FLOPs of the forward pass, a token"]
    print(f"{'FLOPs of a token':24}{sum(forward.values()):>17,.0f}  forward, at a full context")
    for part, count in forward.items():
        print(f"  {part:22}{count:>17,.0f}{count / sum(forward.values()):7.1%}")
    print(f"  {'forward and backward':22}{results['FLOPs of a token']:>17,.0f}  three times as many")
    print(f"  {'of a step':22}{results['FLOPs of a step']:>17.3g}")
    print(f"  {'of the run':22}{results['FLOPs of the run']:>17.3g}\n")

    print(f"{'on disk':24}{gib(results['bytes of model.safetensors']):>17}  model.safetensors")
    print(f"{'':24}{gib(results['bytes of a checkpoint']):>17}  a checkpoint, with the moments of {plan.optimizer}\n")
    show_memory(results, config, arguments)

    print(
        f"time on {arguments.gpus} {arguments.gpu} at {arguments.mfu:.0%} of {arguments.peak / 1e12:,.0f} TFLOP/s: "
        f"{results['tokens a second']:,.0f} tokens/s, {results['seconds of a step']:.3g} s a step, "
        f"{results['hours of the run']:,.3g} hours for {plan.max_iters:,} steps "
        f"({short(results['tokens of the run'])} tokens)\n"
    )
    best = results["Chinchilla"]
    print(f"the best number of tokens for {short(parameters)} parameters, by Chinchilla:")
    for name in ("table A3", "the published fit", "the corrected fit"):
        count = best[f"best tokens by {name}"]
        print(f"  {name:22}{short(count):>17}  {count / parameters:.0f} tokens a parameter")
    print(f"the best size for {best['FLOPs']:.3g} FLOPs:")
    for name in ("the published fit", "the corrected fit"):
        size, count = best[f"best parameters and tokens by {name}"]
        print(f"  {name:22}{short(size):>17}  on {short(count)} tokens")


def show_memory(results: dict, config: NanoGPTConfig, arguments: argparse.Namespace) -> None:
    """The part of the report about memory: with and without gradient checkpointing, side by side."""
    plan, settings, fitting = arguments.plan, results["settings"], results["fitting"]
    columns: list[TrainingMemory] = [each["memory"] for each in fitting.values()]
    print(
        f"memory to train, on each GPU: micro-batches of {plan.batch_size} x {config.block_size:,} tokens, "
        f"{settings['dtype']}, {plan.optimizer}"
    )
    print(" " * 30 + "".join(f"{name:>24}" for name in fitting))
    for field in ("weights", "gradients", "moments", "activations"):
        print(f"  {field:28}" + "".join(f"{gib(getattr(each, field)):>24}" for each in columns))
    for time in columns[0].peaks:
        print(f"  {f'peak at {time}':34}{gib(columns[0].peaks[time]):>20}{gib(columns[1].peaks[time]):>24}")
    print(f"  {'peak':28}" + "".join(f"{gib(each.peak):>24}" for each in columns))
    size = gib(arguments.memory)
    print(f"the largest micro-batch for {size}, of which a tenth is left free:")
    for name, each in fitting.items():
        largest, divisor = each["largest micro-batch"], each["largest divisor of a step"]
        flags = "not even one window fits"
        if divisor:
            flags = f"--batch_size={divisor} --gradient_accumulation_steps={plan.windows // divisor}"
            flags += " --gradient_checkpointing=true" if name.startswith("with ") else ""
        print(f"  {name:28}{largest:>6}  {flags}")
    print()


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def draw(path: str, results: dict, arguments: argparse.Namespace) -> None:
    """Draw four panels: memory over micro-batches, and three of Chinchilla's laws."""
    import numpy as np
    from matplotlib.figure import Figure

    parameters = results["parameters"]
    tokens = results["tokens of the run"]
    sizes = np.geomspace(min(1e6, parameters / 10), max(1e11, parameters * 10), 200)
    counts = np.geomspace(min(1e8, tokens / 10), max(1e13, tokens * 10), 200)
    figure = Figure(figsize=(12, 9), layout="constrained")
    (by_batch, plane), (by_size, line) = figure.subplots(2, 2)
    draw_memory(by_batch, results["settings"], arguments)
    draw_losses(plane, sizes, counts)
    draw_sizes(by_size, results["Chinchilla"]["FLOPs"])
    draw_best_tokens(line, sizes)
    plane.plot([tokens], [parameters], "ko", label="this run")
    plane.legend(loc="upper left")
    line.plot([parameters], [tokens], "ko", label="this run")
    line.legend(frameon=False)
    for axes in (plane, line):
        axes.set_yscale("log")
    for axes in (plane, by_size, line):
        axes.set_xscale("log")
    for axes in (by_batch, plane, by_size, line):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def draw_memory(axes, settings: dict, arguments: argparse.Namespace) -> None:
    """The peak over the size of the micro-batch, with and without gradient checkpointing."""
    import numpy as np

    batch_size = arguments.plan.batch_size
    batches = np.unique(np.linspace(1, max(4, 2 * batch_size), 60).astype(int))
    for name, checkpoints in (("without gradient checkpointing", False), ("with", True)):
        changed = settings | {"gradient_checkpointing": checkpoints, "keeps_gradients": True}
        peaks = [training_memory(batch_size=int(batch), **changed).peak / 2**30 for batch in batches]
        axes.plot(batches, peaks, label=name)
    axes.axhline(arguments.memory / 2**30, color="gray", linestyle="--", label=f"{gib(arguments.memory)} of a GPU")
    axes.axvline(batch_size, color="gray", linewidth=0.8, linestyle=":", label="the micro-batch")
    axes.set(xlabel="windows in a micro-batch", ylabel="GiB at the peak", title="memory to train")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_losses(axes, sizes, counts) -> None:
    """Lines of equal loss and lines of equal FLOPs, over the number of tokens and the size."""
    losses = CORRECTED.loss(sizes[:, None], counts[None, :])
    lines = axes.contour(counts, sizes, losses, levels=[2, 2.2, 2.5, 3, 3.5, 4, 5, 7], colors="C0", linewidths=0.8)
    axes.clabel(lines, fmt="%g", fontsize=8)
    powers = [10.0**power for power in range(14, 28, 2)]
    work = 6 * sizes[:, None] * counts[None, :]  # FLOPs
    lines = axes.contour(counts, sizes, work, levels=powers, colors="C1", linewidths=0.8, linestyles="--")
    axes.clabel(lines, fmt=lambda level: f"{level:.0e} FLOPs", fontsize=8)
    axes.set(xlabel="tokens", ylabel="parameters", title="loss by Chinchilla's corrected fit, and FLOPs")


def draw_sizes(axes, flops: float) -> None:
    """The losses of all sizes that are trained with equal FLOPs."""
    import numpy as np

    for number, (name, fit) in enumerate(FITS.items()):
        best, _ = fit.best_size(flops)
        sizes = np.geomspace(best / 30, best * 30, 200)
        label = f"{name}: best with {short(best)}"
        axes.plot(sizes, [fit.loss(size, flops / 6 / size) for size in sizes], color=f"C{number}", label=label)
        axes.axvline(best, color=f"C{number}", linewidth=0.8, linestyle="--")
    axes.set(xlabel="parameters", ylabel="loss, nats a token", title=f"loss of all sizes with {flops:.2g} FLOPs")
    axes.legend(frameon=False)


def draw_best_tokens(axes, sizes) -> None:
    """The best number of tokens for each size, by the fits and by the table."""
    for number, (name, fit) in enumerate(FITS.items()):
        axes.plot(sizes, [fit.best_tokens(size) for size in sizes], color=f"C{number}", label=name)
    axes.plot(sizes, [tokens_by_table(size) for size in sizes], "C2", linewidth=1, label="line through table A3")
    axes.plot(*zip(*TABLE_A3, strict=True), "C2.", label="table A3")
    axes.set(xlabel="parameters", ylabel="tokens", title="the best number of tokens for a size")


def to_json(results: dict) -> str:
    """The results as JSON, with the memory in bytes."""
    results = dict(results)
    settings = results.pop("settings")
    results["arithmetic"] = settings["dtype"]
    results["fitting"] = {
        name: each | {"memory": dataclasses.asdict(each["memory"]) | {"peak": each["memory"].peak}}
        for name, each in results["fitting"].items()
    }
    return json.dumps(results, indent=2)


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    try:
        config, tokens, known = find_config(arguments.subject, arguments.revision, arguments.plan)
    except ValueError as mistake:
        parser.error(str(mistake))
    results = measure(
        config,
        arguments.plan,
        memory=arguments.memory,
        peak=arguments.peak,
        gpus=arguments.gpus,
        mfu=arguments.mfu,
        flops=arguments.flops,
    )
    if arguments.plot:
        try:
            draw(arguments.plot, results, arguments)
        except OSError as error:
            parser.error(f"--plot={arguments.plot} cannot be written: {error.strerror}")
    if arguments.json:
        print(to_json(results))
    else:
        show(results, config, tokens, known, arguments)


if __name__ == "__main__":
    main(arguments)
