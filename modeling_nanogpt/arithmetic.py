"""What a run computes with: its precision, and whether its model is compiled."""

import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_nanogpt import NanoGPTConfig
from .muon import arithmetic_dtype
from .plain_attention import LONGEST
from .sources import first_line
from .throughput import flops_per_token

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # our name -> Accelerate's name
ATTENTION = ("auto", "sdpa", "plain", "eager", "flex_attention")  # those that need no download
# On a CPU, the casts between products cost more than small products gain. From these widths on, a step in bfloat16 is
# faster than one in float32: with PyTorch's attention, and with plain attention (docs/benchmarks.md has the times).
WIDE, WIDE_IF_PLAIN = 192, 64
# FLOPs of a run that takes a CPU about ten minutes or more. Compiling takes about one minute.
LONG = 1e14
# If a micro-batch has fewer FLOPs than this, a GPU computes for about as long as the host takes to launch its kernels,
# or for less. CUDA graphs launch all kernels at once.
LAUNCH_BOUND = 5e12


def move_to_accelerator(model: PreTrainedModel) -> torch.device:
    """Move a model to the GPU, or to the machine's other accelerator. Returns the device, which is the CPU if none."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that mypy cannot follow
    return device


class Choice(NamedTuple):
    """What was chosen, and the reason. The reason is empty if a flag has named the value."""

    value: Any
    reason: str


def check_flags(flags, device: torch.device) -> None:
    """Raise ValueError if the device cannot compute as the trainer's flags or `accelerate launch` ask."""
    launched = launched_precision()
    wanted = launched if flags.dtype == "auto" else PRECISIONS[flags.dtype]
    if launched not in ("no", wanted):
        raise ValueError(
            f"dtype={flags.dtype}, but accelerate launch asks for mixed_precision={launched}: leave out --dtype, or "
            f"give accelerate launch --mixed_precision={wanted}"
        )
    check_attention(flags.attn_implementation, device)
    if wanted == "fp16" and device.type == "cpu":
        if launched == "fp16":  # perhaps by the file that `accelerate config` has written
            raise ValueError(
                "accelerate launch asks for mixed_precision=fp16, which needs a GPU: on a CPU give accelerate launch "
                "--mixed_precision=no or bf16"
            )
        raise ValueError("dtype=float16 needs a GPU: on a CPU use --dtype=float32 or --dtype=bfloat16")
    if flags.compile is True and (obstacle := why_not_compiled(device)):
        raise ValueError(
            f"compile=true, but torch cannot compile here ({obstacle}): install a C++ compiler such as g++, or leave "
            "out --compile"
        )


def check_attention(name: str, device: torch.device) -> None:
    """Raise ValueError if there is no such attention function, or if it does not run on the device."""
    is_kernel = "/" in name
    if not is_kernel and name not in ATTENTION:
        raise ValueError(
            f"attn_implementation={name}, but it must be {', '.join(ATTENTION)}, or a kernel on the Hub such as "
            "kernels-community/flash-attn3"
        )
    if device.type == "cpu" and (is_kernel or name == "flex_attention"):
        raise ValueError(f"attn_implementation={name} trains on a GPU only: leave it out, or use sdpa, plain or eager")
    if is_kernel and find_spec("kernels") is None:
        raise ValueError(f"attn_implementation={name} needs the package kernels: pip install kernels")


def launched_precision() -> str:
    """Accelerate's name of the precision that `accelerate launch` asks for: no, bf16 or fp16, or else a ValueError."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in PRECISIONS.values():
        raise ValueError(f"accelerate launch asks for mixed_precision={launched}, but it must be no, bf16 or fp16")
    return launched


def choose_precision(dtype: str, config: PreTrainedConfig, device: torch.device, run: dict) -> Choice:
    """Accelerate's name of the precision: no, bf16 or fp16.

    `run` is what the checkpoint says of the run that is resumed; it is empty for a new run. On a CPU, a resumed run
    keeps the precision that it began with.
    """
    launched = launched_precision()
    if dtype != "auto":
        return Choice(PRECISIONS[dtype], "")
    if launched != "no":
        return Choice(launched, "as launched")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", "auto: fast on this GPU")
        return Choice("fp16", "auto: this GPU has no bfloat16")
    if run:
        return Choice(run.get("precision", "no"), "auto: as the run began")
    if arithmetic_dtype(device) == torch.float32:
        return Choice("no", f"auto: this {device.type} has no fast bfloat16")
    is_plain = isinstance(config, NanoGPTConfig) and config.block_size <= LONGEST
    if config.hidden_size < (WIDE_IF_PLAIN if is_plain else WIDE):
        return Choice("no", f"auto: a model {config.hidden_size} wide is too narrow to gain from bfloat16 on a CPU")
    return Choice("bf16", f"auto: fast on this {device.type}")


def choose_attention(flags, config: PreTrainedConfig, device: torch.device, precision: str, run: dict) -> Choice:
    """The attention function: on a CPU in bfloat16, plain_attention.py's if it is faster, else PyTorch's own.

    `run` is what the checkpoint says of the run that is resumed; it is empty for a new run. On a CPU, a resumed run
    keeps the function that it began with.
    """
    if flags.attn_implementation != "auto":
        return Choice(flags.attn_implementation, "")
    if device.type != "cpu":
        return Choice("sdpa", "")
    if run:
        began = run.get("attention") == "plain"
        return Choice("plain" if began else "sdpa", "auto: as the run began")
    if precision == "bf16" and config.block_size <= LONGEST:
        return Choice("plain", "auto: faster in bfloat16 on a CPU")
    return Choice("sdpa", "")


def choose_compile(flags, config: NanoGPTConfig, device: torch.device, run: dict) -> Choice:
    """Whether the model is compiled.

    `run` is what the checkpoint says of the run that is resumed; it is empty for a new run. A resumed run is compiled
    if it was compiled from its beginning, because otherwise it would not continue bit for bit.
    """
    if flags.compile != "auto":
        return Choice(flags.compile, "")
    if flags.eval_only:
        return Choice(False, "auto: no training")
    began = run.get("compile", run["recipe"]["compile"]) if run else "auto"
    step_tokens = flags.batch_size * flags.gradient_accumulation_steps * config.block_size
    if began != "auto":
        compiles, reason = began, "as the run began"
    elif device.type == "cpu":
        compiles = flags.max_iters * step_tokens * flops_per_token(config) >= LONG
        reason = "a long run" if compiles else "the run is too short to earn the time that compiling takes"
    else:
        compiles, reason = device.type == "cuda", f"on {device.type}"
    if compiles and (obstacle := why_not_compiled(device)):
        compiles, reason = False, f"torch cannot compile here ({obstacle})"
    return Choice(compiles, f"auto: {reason}")


def compile_mode(flags, config: NanoGPTConfig, processes: Accelerator) -> str:
    """torch.compile's mode: reduce-overhead, which is CUDA graphs, for small steps of a single process on a GPU.

    The graph of a backward pass leaves gradients at fixed addresses, so a step must have one micro-batch.
    """
    alone = processes.device.type == "cuda" and processes.num_processes == flags.gradient_accumulation_steps == 1
    flops = flags.batch_size * config.block_size * flops_per_token(config)
    return "reduce-overhead" if alone and flops < LAUNCH_BOUND else "default"


def why_not_compiled(device: torch.device) -> str:
    """Why torch.compile does not work here, or "" if it works. It needs a C++ compiler, and on a GPU also Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # torch raises many kinds
        return first_line(error)[:300]
    return ""
