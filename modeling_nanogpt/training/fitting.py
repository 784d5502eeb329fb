"""What fits: batches into processes and into memory, and what to say if they do not fit."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel

from ..sources import first_line


def windows_in_step(flags, processes: PartialState) -> int:
    """The windows of an optimizer step, over all processes. Raises ValueError if they cannot share them equally.

    If the size of a micro-batch is found automatically, then only the number of windows must be divisible.
    """
    micro_batches, count = flags.gradient_accumulation_steps, processes.num_processes
    windows, automatic = flags.batch_size * micro_batches, flags.auto_batch_size
    if automatic and processes.device.type != "cuda":
        raise ValueError(
            "auto_batch_size needs a GPU, because a batch that is too large for the memory of a CPU may bring down "
            "the system: choose a --batch_size"
        )
    if (windows if automatic else micro_batches) % count:
        raise ValueError(
            f"gradient_accumulation_steps={micro_batches} counts the micro-batches of all processes: it must be "
            f"divisible by their number, {count}"
        )
    return windows


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let the model compute attention by this function. If a kernel cannot be loaded, the process ends in one line."""
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # of the Hub, of the connection, of a kernel that does not suit the GPU
        sys.exit(f"train_accelerate.py: error: attn_implementation={name} cannot be loaded ({first_line(error)})")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each block compute its activations again in the backward pass, instead of keeping them."""
    # newer transformers have renamed this method and warn about the old name; 5.17 has only the old name
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()


def largest_batch_size(model: PreTrainedModel, windows: int, accelerator: Accelerator) -> int:
    """The largest divisor of `windows` that fits into memory as a micro-batch, on every process.

    Each candidate runs a forward and a backward pass, with room for the two moments of AdamW. The model is on its
    device and not prepared yet, so that no process waits for another one that has run out of memory.
    """

    def attempt(batch_size: int) -> None:
        moments = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
        tokens = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=model.device)
        try:
            with accelerator.autocast():
                model(input_ids=tokens, shift_labels=tokens, skip_logits=True, use_cache=False).loss.backward()
        finally:
            model.zero_grad(set_to_none=True)
            del moments

    fits = largest_divisor(windows, attempt)
    return int(accelerator.gather(torch.tensor([fits], device=model.device)).min())


def largest_divisor(windows: int, attempt: Callable[[int], None]) -> int:
    """The largest divisor of `windows` for which attempt(divisor) does not run out of memory, or 1."""
    for batch_size in (size for size in range(windows, 0, -1) if windows % size == 0):
        fits = try_batch_size(batch_size, attempt)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if fits:
            return batch_size
    return 1  # the loop will run out of memory, and say so


def try_batch_size(batch_size: int, attempt: Callable[[int], None]) -> bool:
    """Whether a batch fits. The exception is gone on return, because its frames hold on to tensors."""
    try:
        attempt(batch_size)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


@contextmanager
def ended_in_one_line(flags) -> Iterator[None]:
    """Let Ctrl-C, and a model that does not fit into memory, end the process with one line and no traceback.

    While the run trains, Ctrl-C saves and stops, so only the time before that comes here.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\ntrain_accelerate.py: stopped before training; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        advice = explain_out_of_memory(
            flags.batch_size, flags.gradient_accumulation_steps, flags.gradient_checkpointing
        )
        sys.exit(f"\ntrain_accelerate.py: error: {advice}")  # on a line below the bar


def explain_out_of_memory(batch_size: int, gradient_accumulation_steps: int, gradient_checkpointing: bool) -> str:
    """What to try: the next smaller micro-batch that keeps the global batch, and activation checkpointing."""
    divisors = [k for k in range(2, batch_size + 1) if batch_size % k == 0]
    tries = []
    if divisors:
        k = divisors[0]
        smaller = f"--batch_size={batch_size // k} --gradient_accumulation_steps={gradient_accumulation_steps * k}"
        tries.append(f"{smaller} keeps the same global batch (--auto_batch_size=true finds the largest on a GPU)")
    if not gradient_checkpointing:
        tries.append("--gradient_checkpointing=true takes less memory for more time")
    if not tries:
        tries.append("try a smaller --block_size or model, or FSDP2 on several GPUs")
    return f"out of memory at batch_size={batch_size}: " + "; ".join(tries)
