"""How well a model predicts a text: the sum of its losses over windows side by side, on any number of processes."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import load_dataset, load_from_disk
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

NO_TARGET = -100  # what cross-entropy ignores


def read_split(data_dir: Path, split: str, length: int) -> list[np.ndarray]:
    """The ids of a split in pieces, read from memory-mapped files without copying: the first `length` of them.

    A data_dir of an earlier layout has padding after the last token.
    """
    is_from_hub = not (data_dir / split).is_dir()  # push_to_hub writes parquet files in a folder data/
    rows = load_dataset(str(data_dir), split=split) if is_from_hub else load_from_disk(data_dir / split)
    pieces: list[np.ndarray] = []
    left = length
    for chunk in rows.data.column("input_ids").chunks:
        pieces.append(chunk.flatten().to_numpy(zero_copy_only=True)[:left])
        left -= len(pieces[-1])
    return pieces


def windows(pieces: Iterable[np.ndarray], block_size: int) -> Iterator[np.ndarray]:
    """Windows of up to block_size + 1 ids, side by side: each id after the first is a target exactly once.

    The last id of a window is the first input of the next one. The last window may be short.
    """
    rest = np.empty(0, dtype=np.int64)
    for piece in pieces:
        start = 0
        if len(rest):  # the window goes on in this piece
            start = block_size + 1 - len(rest)
            rest = np.concatenate([rest, piece[:start]])
            if len(rest) <= block_size:
                continue
            yield rest
            start -= 1
        while start + block_size < len(piece):
            yield piece[start : start + block_size + 1]
            start += block_size
        rest = piece[start:]
    if len(rest) > 1:
        yield rest


def batches(all_windows: Iterator[np.ndarray], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (B, T) and targets (B, T) int64. Beyond the end of a window, inputs are 0 and targets NO_TARGET."""
    while batch := list(islice(all_windows, batch_size)):
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), NO_TARGET)
        for row, window in zip(ids, batch, strict=True):
            row[: len(window)] = torch.from_numpy(window.astype(np.int64))
        yield ids[:, :-1].clamp(min=0), ids[:, 1:]


@torch.no_grad()
def sum_losses(
    model: PreTrainedModel,
    pieces: list[np.ndarray],
    *,
    block_size: int,
    batch_size: int,
    accelerator: Accelerator,
    progress=lambda batches, total: batches,
) -> tuple[float, int]:
    """The sum of the losses (nats) of all targets, and their number, over all processes.

    The sum is in float64, so it is the same for any batch size and any number of processes, up to the rounding of
    single losses. `progress` is a bar around the batches of this process, of which there are about `total`.
    """
    mine = islice(windows(pieces, block_size), accelerator.process_index, None, accelerator.num_processes)
    targets_in_all = max(sum(map(len, pieces)) - 1, 0)
    total = math.ceil(targets_in_all / block_size / batch_size / accelerator.num_processes)
    sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
    for inputs, targets in progress(batches(mine, batch_size), total):
        inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast():
            logits = model(input_ids=inputs, use_cache=False).logits  # (B, T, V)
        losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")  # (B * T)
        sums += torch.stack([losses.double().sum(), (targets != NO_TARGET).sum().double()]).cpu()
    nats, count = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return nats, int(count)
