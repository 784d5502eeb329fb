"""What the processes of a run send each other in an optimizer step: by formulas, and counted in runs of the trainer.

    python docs/count_bytes.py count      train tiny models on two and four processes of this CPU, count, and compare
    python docs/count_bytes.py tables     the tables of docs/scaling_out.md for four sizes of GPT-2

A collective is noted with the bytes of its whole tensor. In a ring of N processes, each process sends (N - 1) / N of
these bytes for an all-gather or a reduce-scatter, and twice as many for an all-reduce, which consists of both.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_accelerate
from modeling_nanogpt import NanoGPTConfig
from modeling_nanogpt.gpus import PEAK_FLOPS
from modeling_nanogpt.memory import FLOAT, block_matrices, muon_bytes, parameters_by_part, training_memory
from modeling_nanogpt.muon import COEFFICIENTS, arithmetic_dtype
from modeling_nanogpt.plan import GPT2_SHAPES
from modeling_nanogpt.throughput import flops_per_token
from modeling_nanogpt.training.hooks import Hooks

ROOT = Path(__file__).parent.parent
BFLOAT16 = 2  # bytes

# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def block_parameters(config: NanoGPTConfig) -> int:
    """The parameters in all blocks together: what FSDP2 gathers block by block."""
    parts = parameters_by_part(config)
    return sum(count for part, count in parts.items() if part.startswith(("ln_1", "attn", "ln_2", "mlp")))


def matrix_parameters(config: NanoGPTConfig) -> int:
    """The parameters that Muon trains: the matrices of the blocks."""
    return sum(rows * columns * count for (rows, columns), count in block_matrices(config).items())


def ddp_bytes(config: NanoGPTConfig) -> dict[str, int]:
    """Whole bytes of DDP's collectives in a step, by kind. Gradients are float32, and sent in the last micro-batch."""
    return {"all-reduce": FLOAT * sum(parameters_by_part(config).values())}


def fsdp2_bytes(config: NanoGPTConfig, micro_steps: int, number: int) -> dict[str, int]:
    """Whole bytes of FSDP2's collectives in a step of so many micro-batches a process, by kind.

    `number` is the bytes of a number in the arithmetic. Each micro-batch gathers the blocks for the forward pass and
    again for the backward pass, and all else once. The gradients are sent in the last micro-batch, as in DDP.
    """
    total, blocks = sum(parameters_by_part(config).values()), block_parameters(config)
    gathered = micro_steps * number * (2 * blocks + (total - blocks))
    return {"all-gather": gathered, "reduce-scatter": number * total}


def gather_bytes(config: NanoGPTConfig, number: int) -> dict[str, int]:
    """Whole bytes of the momenta that Muon gathers under FSDP2. `number` is the bytes of one of Muon's numbers."""
    return {"all-gather": number * matrix_parameters(config)}


def share_bytes(config: NanoGPTConfig, number: int, processes: int) -> dict[str, int]:
    """Whole bytes of what the processes of a machine exchange after each has orthogonalised its part of the matrices.

    All parts have the same size, so the last ones may be padded.
    """
    exchanged = 0
    for (rows, columns), count in block_matrices(config).items():
        exchanged += number * rows * columns * processes * math.ceil(count / processes)
    return {"all-gather": exchanged}


def step_bytes(
    config: NanoGPTConfig, kind: str, optimizer: str, dtype: str, processes: int, micro_steps: int
) -> Counter[str]:
    """Whole bytes of all collectives in a step on the CPUs of this machine, by kind."""
    number = FLOAT if dtype == "float32" else BFLOAT16
    whole = Counter(ddp_bytes(config) if kind == "ddp" else fsdp2_bytes(config, micro_steps, number))
    if optimizer == "muon":
        of_muon = arithmetic_dtype(torch.device("cpu")).itemsize  # bfloat16, if the CPU has it
        whole.update(share_bytes(config, of_muon, processes))
        if kind == "fsdp2":
            whole.update(gather_bytes(config, of_muon))
    return whole


def sent(whole: dict[str, int], processes: int) -> float:
    """The bytes that each process sends, in rings."""
    share = (processes - 1) / processes
    return sum(count * share * (2 if kind == "all-reduce" else 1) for kind, count in whole.items())


# ---------------------------------------------------------------------------------------------------------------------
# Counting

KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}
SMALL = 1024  # bytes: what is not larger has no weights, but norms, or whether a signal has come
NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")  # they belong to a collective that was counted


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that collectives take or give, whichever is larger, and how many were small."""

    def __init__(self):
        super().__init__()
        self.whole: Counter[str] = Counter()  # bytes of each kind
        self.calls: Counter[str] = Counter()
        self.small = 0  # collectives without weights

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # so that DTensor makes collectives of it, which come here then
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0]
            tensors = [each for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)]
            size = max((tensor.nbytes for tensor in tensors), default=0)
            if name in NO_COLLECTIVES:
                pass
            elif size <= SMALL:
                self.small += 1
            else:
                kind = KINDS.get(name, name)  # a kind that the formulas don't know shows under its own name
                self.whole[kind] += size
                self.calls[kind] += 1
        return result


COUNTERS: list[ByteCounter] = []  # the one of this process


def begin_counting() -> None:
    COUNTERS.append(ByteCounter())
    COUNTERS[-1].__enter__()


def end_counting(path: str) -> None:
    """Write what was counted."""
    counter = COUNTERS.pop()
    counter.__exit__(None, None, None)
    counted = {"whole": counter.whole, "calls": counter.calls, "small": counter.small}
    Path(path).write_text(json.dumps(counted), encoding="utf-8")


class CountSecondStep(Hooks):
    """Counts the second step: the first one also sends what a run begins with."""

    def __init__(self, path: str):
        self.path = path

    def before_step(self, step):
        if step == 1:
            begin_counting()
        if step == 2:
            end_counting(self.path)


def take_cpus_for_gpus() -> None:
    """Let Accelerate use FSDP2, which it allows on GPUs only."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def environment_of(kind: str) -> dict[str, str]:
    """What accelerate launch would set for one of hub_configs/accelerate, as far as it says how to shard."""
    config = yaml.safe_load((ROOT / "hub_configs" / "accelerate" / f"{kind}.yaml").read_text(encoding="utf-8"))
    sharding = {key.upper(): str(value) for key, value in config.get("fsdp_config", {}).items()}
    return sharding | {"ACCELERATE_USE_FSDP": "true"} if sharding else {}


LAYERS, HEADS, WIDTH, CONTEXT = 3, 2, 64, 16
MICRO_STEPS = 2  # micro-batches of each process in a step


def run_counted(kind: str, processes: int, optimizer: str, dtype: str) -> tuple[NanoGPTConfig, dict]:
    """Train a tiny model for three steps. Returns its shape, and what process 0 counted in the second step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"corpus": ROOT / "README.md", "tokenizer": "char", "data_dir": f"{folder}/data"}
        flags |= {"block_size": CONTEXT, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "batch_size": 2}
        flags |= {"gradient_accumulation_steps": MICRO_STEPS * processes, "out_dir": f"{folder}/out"}
        flags |= {"max_iters": 3, "eval_tokens": 64, "log_interval": 3, "optimizer": optimizer, "dtype": dtype}
        flags["compile"] = False
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [__file__, "worker", kind, f"{folder}/counted"]
        command += [str(ROOT / "hub_configs" / "quickstart.yaml")]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment_of(kind)
        command += [f"--{key}={value}" for key, value in flags.items()]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        config = NanoGPTConfig.from_pretrained(f"{folder}/out")
        return config, json.loads(Path(f"{folder}/counted.0").read_text(encoding="utf-8"))


def work(kind: str, path: str, *argv: str) -> None:
    """A process of such a run."""
    if kind == "fsdp2":
        take_cpus_for_gpus()
    train_accelerate.run(list(argv), CountSecondStep(f"{path}.{os.environ['RANK']}"))


def count() -> None:
    """Compare what is counted with the formulas."""
    print("| | processes | collective | calls | whole bytes, counted | by formula | sent by each process |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    cases = [("ddp", "adamw", "bfloat16"), ("ddp", "muon", "bfloat16"), ("fsdp2", "adamw", "float32")]
    cases += [("fsdp2", "adamw", "bfloat16"), ("fsdp2", "muon", "bfloat16")]
    for kind, optimizer, dtype in cases:
        for processes in (2, 4):
            config, counted = run_counted(kind, processes, optimizer, dtype)
            formula = step_bytes(config, kind, optimizer, dtype, processes, MICRO_STEPS)
            for name in sorted(formula.keys() | counted["whole"].keys()):
                whole = counted["whole"].get(name, 0)
                print(
                    f"| {kind}, {optimizer}, {dtype} | {processes} | {name} | {counted['calls'].get(name, 0)} "
                    f"| {whole:,} | {formula.get(name, 0):,} | {sent({name: whole}, processes):,.0f} |"
                )
            print(f"{kind}, {processes} processes: {counted['small']} small collectives", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

NAMES = {"124M": "gpt2", "350M": "gpt2-medium", "774M": "gpt2-large", "1.5B": "gpt2-xl"}
WINDOWS, BATCH_SIZE = 512, 8  # windows of 1,024 tokens in a step, over all GPUs, and in a micro-batch
RATE = 0.4 * PEAK_FLOPS["H100"]  # FLOP/s of a GPU: an MFU of 40 %
LINKS = [(1, math.inf), (8, 450e9), (64, 400e9), (64, 50e9)]  # GPUs, and bytes a second that each sends and receives
IN_MACHINE = 8  # the GPUs of a machine


def config_of(name: str) -> NanoGPTConfig:
    layers, heads, width = GPT2_SHAPES[NAMES[name]]
    return NanoGPTConfig(vocab_size=50304, block_size=1024, n_layer=layers, n_head=heads, n_embd=width)


def micro_steps_of(gpus: int) -> int:
    """The micro-batches of each GPU in a step."""
    return WINDOWS // BATCH_SIZE // gpus


def print_row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def print_bytes() -> None:
    print_row("model", "GPUs", "DDP", "FSDP2", "Muon's exchange in a machine", "Muon's gathers under FSDP2")
    print_row("---", *["---:"] * 5)
    for name in NAMES:
        config = config_of(name)
        for gpus in (8, 64):
            counts = [
                sent(ddp_bytes(config), gpus),
                sent(fsdp2_bytes(config, micro_steps_of(gpus), BFLOAT16), gpus),
                sent(share_bytes(config, BFLOAT16, IN_MACHINE), IN_MACHINE),
                sent(gather_bytes(config, BFLOAT16), gpus),
            ]
            print_row(name, gpus, *(f"{count / 1e9:.2f}" for count in counts))


def print_seconds() -> None:
    """Milliseconds of a step: the GPU's own work, and what is sent. In brackets is what the work does not hide."""
    print_row("model", "GPUs", "link, GB/s", "compute", "DDP", "FSDP2", "Muon's gathers")
    print_row("---", *["---:"] * 6)
    for name in NAMES:
        config = config_of(name)
        for gpus, link in LINKS:
            compute = BATCH_SIZE * config.block_size * flops_per_token(config) / RATE  # of a micro-batch
            sends = [
                (ddp_bytes(config), ddp_late(config, gpus, link, compute)),
                (fsdp2_bytes(config, micro_steps_of(gpus), BFLOAT16), fsdp2_late(config, gpus, link, compute)),
            ]
            cells = [f"{1e3 * sent(whole, gpus) / link:.0f} ({1e3 * late:.0f})" for whole, late in sends]
            cells.append(f"{1e3 * sent(gather_bytes(config, BFLOAT16), gpus) / link:.0f}")
            speed = f"{link / 1e9:.0f}" if gpus > 1 else "–"
            print_row(name, gpus, speed, f"{1e3 * micro_steps_of(gpus) * compute:,.0f}", *cells)


def print_sharing() -> None:
    """Milliseconds of Muon's update, if each GPU does all of it and if GPUs share it, and of a step's computing."""
    print_row("model", "each does all", "8 share", "64 share, 400 GB/s", "64 share, 50 GB/s", "a step on 8", "on 64")
    print_row("---", *["---:"] * 6)
    for name in NAMES:
        config = config_of(name)
        compute = BATCH_SIZE * config.block_size * flops_per_token(config) / RATE  # of a micro-batch
        seconds = []
        for gpus, link in LINKS:
            exchange = sent(share_bytes(config, BFLOAT16, gpus), gpus) / link
            seconds.append(orthogonalization_flops(config, gpus) / RATE + exchange)
        steps = [micro_steps_of(gpus) * compute for gpus in (8, 64)]
        print_row(name, *(f"{1e3 * each:.1f}" for each in seconds), *(f"{1e3 * each:,.0f}" for each in steps))


def ddp_late(config: NanoGPTConfig, gpus: int, link: float, compute: float) -> float:
    """Seconds of a step in which the GPU waits for DDP. `compute` is the seconds of a micro-batch.

    The gradients of the blocks travel during the last backward pass, two thirds of a micro-batch. The gradient of the
    embedding is complete only at the end of this pass, so it travels after it.
    """
    blocks = block_parameters(config)
    rest = sum(parameters_by_part(config).values()) - blocks
    in_time, after = (sent({"all-reduce": FLOAT * count}, gpus) / link for count in (blocks, rest))
    return max(0, in_time - compute * 2 / 3) + after


def fsdp2_late(config: NanoGPTConfig, gpus: int, link: float, compute: float) -> float:
    """Seconds of a step in which the GPU waits for FSDP2. `compute` is the seconds of a micro-batch.

    A block is gathered while the block before it is computed. The embedding is gathered before the first block, and
    its gradient travels after the last backward pass.
    """
    micro_steps, blocks = micro_steps_of(gpus), block_parameters(config)
    rest = sum(parameters_by_part(config).values()) - blocks
    gather, gather_rest = (sent({"all-gather": BFLOAT16 * count}, gpus) / link for count in (blocks, rest))
    forward, backward = compute / 3, compute * 2 / 3
    late = micro_steps * (gather_rest + max(0, gather - forward)) + (micro_steps - 1) * max(0, gather - backward)
    # in the last backward pass, a reduce-scatter sends as many bytes as a gather
    return late + max(0, 2 * gather - backward) + gather_rest


def orthogonalization_flops(config: NanoGPTConfig, processes: int = 1) -> float:
    """FLOPs of a process whose machine has so many, and whose part is the largest, to orthogonalise once."""
    flops = 0.0
    for (rows, columns), count in block_matrices(config).items():
        part = math.ceil(count / processes)
        flops += len(COEFFICIENTS) * part * (4 * rows**2 * columns + 2 * rows**3)
    return flops


def print_memory() -> None:
    """GB on each GPU: what is kept between micro-batches, and the peak."""
    print_row("model", "DDP", "FSDP2 on 8 GPUs", "FSDP2 on 64 GPUs", "Muon's step, beside what is kept")
    print_row("---", *["---:"] * 4)
    for name in NAMES:
        config = config_of(name)
        total, blocks = sum(parameters_by_part(config).values()), block_parameters(config)
        memory = training_memory(config, batch_size=BATCH_SIZE)
        whole = memory.weights + memory.gradients + memory.moments
        cells = [f"{whole / 1e9:.2f}, {memory.peak / 1e9:.1f}"]
        for gpus in (8, 64):
            kept = whole / gpus
            if micro_steps_of(gpus) > 1:
                kept += BFLOAT16 * total  # gradients that wait for the last micro-batch are whole
            gathered = BFLOAT16 * (total - blocks + 2 * blocks // config.n_layer)  # the embedding and two blocks
            cells.append(f"{kept / 1e9:.2f}, {(memory.peak - whole + kept + gathered) / 1e9:.1f}")
        print_row(name, *cells, f"{muon_bytes(config) / 1e9:.1f}")


TABLES = (print_bytes, print_seconds, print_sharing, print_memory)


def main() -> None:
    match sys.argv[1:]:
        case ["count"]:
            count()
        case ["tables"]:
            for table in TABLES:
                table()
                print()
        case ["worker", kind, path, *argv]:
            work(kind, path, *argv)
        case _:
            sys.exit("say what to do: python docs/count_bytes.py count|tables")


if __name__ == "__main__":
    main()
