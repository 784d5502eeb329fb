"""Windows on the token stream of a data_dir: which ones a step trains on, and their ids.

A window is T + 1 consecutive tokens: T inputs and, one further, T targets. Which windows a step sees is a pure
function of the seed and the step, so any step can be reached at once and on any number of processes.
"""

import json
from pathlib import Path

import numpy as np
from datasets import load_from_disk

NO_TARGET = -100  # what cross-entropy ignores


class TokenStream:
    """One split as a flat sequence of token ids, read from memory-mapped Arrow buffers without copying them.

    `chunks` are the ids (N,) of consecutive stretches, `length` how many of them count (the last row may be padded).
    """

    def __init__(self, chunks: list[np.ndarray], length: int):
        self._chunks = chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])  # (chunks + 1,)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def windows(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """The ids (B, width) int64 that start at offsets (B,); beyond the end of the stream they are NO_TARGET."""
        windows = np.full((len(offsets), width), NO_TARGET, dtype=np.int64)
        first = np.searchsorted(self._starts, offsets, side="right") - 1  # the chunk in which each window starts
        for window, offset, chunk in zip(windows, offsets.tolist(), first.tolist(), strict=True):
            end = min(offset + width, self._length)
            filled = 0
            while offset + filled < end:
                at = offset + filled - self._starts[chunk]
                part = self._chunks[chunk][at : at + min(width, end - offset) - filled]
                window[filled : filled + len(part)] = part
                filled += len(part)
                chunk += 1
        return windows


def open_stream(data_dir: str, split: str) -> TokenStream:
    """The `train` or `val` split of a prepared data_dir."""
    length = json.loads((Path(data_dir) / "prepared.json").read_text())["tokens"][split]
    rows = load_from_disk(Path(data_dir) / split).data.column("input_ids").chunks
    return TokenStream([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in rows], length)


def training_offsets(seed: int, step: int, count: int, stream_length: int, block_size: int) -> np.ndarray:
    """Where the `count` windows of an optimizer step start: (count,) int64, any offset, with replacement.

    Philox is counter-based: the step is its counter, so step 10**6 costs what step 0 does. Raw 64-bit draws are the
    same in every version of NumPy, and the remainder's bias is below 2**-30.
    (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC11.)
    """
    draws = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(count)
    return (draws % np.uint64(stream_length - block_size)).astype(np.int64)


def evaluation_offsets(stream_length: int, block_size: int, most_tokens: int) -> np.ndarray:
    """Where evaluation windows start: side by side, so that every token but the first is a target exactly once.

    The last window may be short. Where they hold more than most_tokens targets (0: no limit), as many as that are
    taken, evenly spaced.
    """
    count = -(-(stream_length - 1) // block_size)
    if most_tokens:
        wanted = min(count, -(-most_tokens // block_size))
        return np.arange(wanted) * count // wanted * block_size
    return np.arange(count) * block_size
