"""The processes of a run, and its Accelerator. If the run cannot be what was launched, one line says why."""

import ctypes
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env

from ..arithmetic import PRECISIONS, check_flags

PATIENCE = timedelta(days=1)  # how long the other processes wait while the main one prepares billions of tokens
# how the processes of each kind train together
TOGETHER = {
    DistributedType.NO: "",
    DistributedType.MULTI_CPU: " by DDP",
    DistributedType.MULTI_GPU: " by DDP",
    DistributedType.MULTI_XPU: " by DDP",
    DistributedType.FSDP: " by FSDP2",
}


def join_processes(flags) -> PartialState:
    """What this process knows of the others.

    Raises ValueError if the run cannot be what was launched, or if the device cannot compute as the flags ask. `flags`
    are the trainer's.
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
    asks_for_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asks_for_fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate launch asks for FSDP 1: set fsdp_version: 2 in its configuration")
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    processes.wait_for_everyone()  # if one leaves below with its line, the others have joined already
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ValueError(
            "accelerate launch asks for a dynamo backend: give accelerate launch --dynamo_backend=no, or take it out "
            "of its configuration; --compile=true compiles the model"
        )
    if processes.distributed_type not in TOGETHER:
        raise ValueError(
            f"{processes.distributed_type.value} is not supported: use DDP or FSDP2, as in hub_configs/accelerate"
        )
    if asks_for_fsdp and not is_sharded(processes):
        raise ValueError("accelerate launch asks for FSDP, which needs several GPUs: drop it and the run uses DDP")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != processes.num_processes:  # torchrun on CPUs without that variable
        raise ValueError(f"{started} processes were started, but each trains alone: set ACCELERATE_USE_CPU=true")
    if launched_by_accelerate and "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        # `accelerate launch --cpu --num_processes 2` sets MASTER_ADDR, but starts only one process
        raise ValueError(
            "accelerate launch was asked for several processes, but starts only one on CPUs: use "
            "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N (or unset MASTER_ADDR for one process)"
        )
    if processes.device.type == "cpu" and launched_by_accelerate and torch.get_num_threads() == 1:
        # `accelerate launch` has set OMP_NUM_THREADS=1, which halves the speed on two cores
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // processes.num_processes))
    if processes.device.type == "cpu":
        keep_freed_memory()
    check_flags(flags, processes.device)
    return processes


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees, for the next step. Only glibc has this function.

    Otherwise glibc would give large blocks back to the system, and each 4 kB of the next step would cost a page fault:
    the steps of a small model had three times as many with Muon. See mallopt(3), M_TRIM_THRESHOLD, M_MMAP_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # never give back the end of the heap
        mallopt(-3, 2**25)  # and keep blocks of up to 32 MiB, the most that glibc allows, in the heap


def is_sharded(processes: PartialState) -> bool:
    """Whether Accelerate will shard the weights over the processes, by FSDP2."""
    several_gpus = processes.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    return several_gpus and parse_flag_from_env("ACCELERATE_USE_FSDP")


def start_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process. `precision` is Accelerate's name of it: no, bf16 or fp16."""
    # a notebook's earlier run may have had another precision, to which Accelerate would hold this one
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # products of float32 matrices use TF32
    return accelerator


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
    dtype = next(name for name, precision in PRECISIONS.items() if precision == accelerator.mixed_precision)
    return f"{processes}{TOGETHER[accelerator.distributed_type]} ({hardware}), {dtype}"
