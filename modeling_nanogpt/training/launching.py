"""The Accelerator of a run. If the run cannot be what was launched, one line says why."""

import os
from collections.abc import Callable
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env

from ..sources import first_line

PATIENCE = timedelta(days=1)  # how long the other processes wait while the main one prepares billions of tokens
# how the processes of each kind train together
TOGETHER = {
    DistributedType.NO: "",
    DistributedType.MULTI_CPU: " by DDP",
    DistributedType.MULTI_GPU: " by DDP",
    DistributedType.MULTI_XPU: " by DDP",
    DistributedType.FSDP: " by FSDP2",
}


def start_accelerator(dtype: str, attention: str, compiles: bool) -> Accelerator:
    """The Accelerator of this process. Raises ValueError if something else would run than what was launched.

    `compiles` says whether the model will be compiled.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_PROCID" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but each of these tasks would train alone: let srun start torchrun or accelerate "
            "launch, once on each machine (--ntasks-per-node=1); for a run of one process, unset SLURM_NTASKS"
        )
    for other in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{other}"):
            raise ValueError(f"accelerate launch asks for {other}: use DDP or FSDP2, as in hub_configs/accelerate")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate launch asks for FSDP 1: set fsdp_version: 2 in its configuration")
    # a notebook's earlier run may have had another precision, to which Accelerate would hold this one
    AcceleratorState._reset_state()
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ValueError(
            "accelerate launch asks for a dynamo backend: give accelerate launch --dynamo_backend=no, or take it out "
            "of its configuration; --compile=true compiles the model"
        )
    accelerator = Accelerator(
        mixed_precision=choose_precision(dtype, attention, state.device),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in TOGETHER:
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported: use DDP or FSDP2, as in hub_configs/accelerate"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("accelerate launch asks for FSDP, which needs several GPUs: drop it and the run uses DDP")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:  # torchrun on CPUs without that variable
        raise ValueError(f"{started} processes were started, but each trains alone: set ACCELERATE_USE_CPU=true")
    if launched_by_accelerate and "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        # `accelerate launch --cpu --num_processes 2` sets MASTER_ADDR, but starts only one process
        raise ValueError(
            "accelerate launch was asked for several processes, but starts only one on CPUs: use "
            "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N (or unset MASTER_ADDR for one process)"
        )
    if accelerator.device.type == "cpu" and launched_by_accelerate and torch.get_num_threads() == 1:
        # `accelerate launch` has set OMP_NUM_THREADS=1, which halves the speed on two cores
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // accelerator.num_processes))
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # products of float32 matrices use TF32
    if compiles:
        check_compiler(accelerator.device)
    return accelerator


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if torch.compile does not work: it needs a C++ compiler, on a GPU also Triton and more."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # torch raises many kinds
        raise ValueError(
            f"compile=true, but torch cannot compile here ({first_line(error)[:300]}): install a C++ compiler such as "
            "g++, or leave out --compile"
        ) from None


def main_first(call: Callable):
    """What call() returns: the main process calls first, then the others.

    If the main process raises ValueError, every process does, so that none of them waits for it.
    """
    is_main = PartialState().is_main_process
    result, mistakes = None, [""]
    if is_main:
        try:
            result = call()
        except ValueError as mistake:
            mistakes = [str(mistake)]
    broadcast_object_list(mistakes)
    if mistakes[0]:
        raise ValueError(mistakes[0])
    return result if is_main else call()


def choose_precision(dtype: str, attention: str, device: torch.device) -> str:
    """Accelerate's name of the precision. `auto` is what `accelerate launch` asks for, or the best of the device."""
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in names.values():
        raise ValueError(f"accelerate launch asks for mixed_precision={launched}, but it must be no, bf16 or fp16")
    if dtype != "auto":
        if launched not in ("no", names[dtype]):
            raise ValueError(
                f"dtype={dtype}, but accelerate launch asks for mixed_precision={launched}: leave out --dtype, or "
                f"give accelerate launch --mixed_precision={names[dtype]}"
            )
        precision = names[dtype]
    elif launched == "no" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    else:
        precision = launched
    if attention == "flex_attention" and device.type == "cpu":
        raise ValueError(
            "attn_implementation=flex_attention trains on a GPU only: use --attn_implementation=sdpa or eager"
        )
    if precision == "fp16" and device.type == "cpu":
        if launched == "fp16":  # perhaps by the file that `accelerate config` has written
            raise ValueError(
                "accelerate launch asks for mixed_precision=fp16, which needs a GPU: on a CPU give accelerate launch "
                "--mixed_precision=no or bf16"
            )
        raise ValueError("dtype=float16 needs a GPU: on a CPU use --dtype=float32 or --dtype=bfloat16")
    return precision


def describe(accelerator: Accelerator) -> str:
    """How many processes run, on what, and how they train together: the first line of the log."""
    count, device = accelerator.num_processes, accelerator.device
    processes = "1 process" if count == 1 else f"{count} processes"
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # torchrun's name for their number
    if machines > 1:
        processes += f" on {machines} machines"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        threads = torch.get_num_threads()
        hardware += ", 1 thread" if threads == 1 else f", {threads} threads"
        if count > 1:
            hardware += " each"
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision]
    return f"{processes}{TOGETHER[accelerator.distributed_type]} ({hardware}), {dtype}"
