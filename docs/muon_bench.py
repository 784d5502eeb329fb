"""Seconds of a training step with Muon on several processes: each orthogonalises all matrices, or they share them.

    torchrun --standalone --nproc_per_node=2 docs/muon_bench.py ddp 4x128 12x64 [TURNS]
    torchrun --standalone --nproc_per_node=2 docs/muon_bench.py fsdp2 12x768 1x256

The second argument is layers x width, the third one windows x tokens in the micro-batch of a process. The two ways
take turns. Printed are medians over the turns, in milliseconds: of the whole step if each process does all, and if
they share; then of the optimizer's part; then the processor time of the first process in the optimizer's part, which
other work on the machine hardly changes. The processes begin each part together.
"""

import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator
from count_bytes import environment_of, take_cpus_for_gpus

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.optimization import make_optimizer

WAYS = ("each all", "shared")


def main(kind: str, shape: str, batch: str, turns: int) -> None:
    (layers, width), (windows, tokens) = (map(int, each.split("x")) for each in (shape, batch))
    on_gpu = torch.cuda.is_available()
    os.environ.update(environment_of(kind) | ({} if on_gpu else {"ACCELERATE_USE_CPU": "true"}))
    if kind == "fsdp2" and not on_gpu:
        take_cpus_for_gpus()
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no")
    torch.manual_seed(0)
    vocab_size = 50304 if width >= 768 else 128
    config = NanoGPTConfig(
        vocab_size=vocab_size, block_size=tokens, n_layer=layers, n_head=width // 64 or 1, n_embd=width
    )
    model = NanoGPTForCausalLM(config).to(accelerator.device)
    optimizer = make_optimizer("muon", model, learning_rate=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(vocab_size, (windows, tokens), device=accelerator.device)
    muon = optimizer.optimizer
    groups = {"each all": None, "shared": muon.machine}
    whole, update, busy = ({way: [] for way in WAYS} for _ in range(3))
    for turn in range(turns + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            muon.machine = groups[way]
            started = meet(accelerator)
            accelerator.backward(model(ids, labels=ids, skip_logits=True, use_cache=False).loss)
            before_update, busy_before = meet(accelerator), time.process_time()
            optimizer.step()
            ended, busy_after = meet(accelerator), time.process_time()
            optimizer.zero_grad()
            if turn:  # the first turn warms up
                whole[way].append(ended - started)
                update[way].append(ended - before_update)
                busy[way].append(busy_after - busy_before)
    if accelerator.is_main_process:
        cells = [f"{1e3 * statistics.median(times[way]):,.1f}" for times in (whole, update, busy) for way in WAYS]
        print(f"| {kind} | {shape} | {batch} | {dist.get_world_size()} | " + " | ".join(cells) + " |")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def meet(accelerator: Accelerator) -> float:
    """Wait for the device and for the other processes. Returns the time."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    accelerator.wait_for_everyone()
    return time.perf_counter()


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit("say what to measure: ddp|fsdp2 LAYERSxWIDTH WINDOWSxTOKENS [TURNS]")
    kind, shape, batch, *turns = sys.argv[1:]
    main(kind, shape, batch, int(turns[0]) if turns else 20)
