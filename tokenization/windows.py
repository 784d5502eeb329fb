"""Windows on the token stream of a data_dir: which ones a step trains on, and their ids.

A window is up to T + 1 consecutive tokens: T inputs and, one further, T targets. Which windows a step sees is a pure
function of the seed and the step, so any step can be reached at once and on any number of processes.
"""

import json
from pathlib import Path

import numpy as np
from datasets import load_from_disk

NO_TARGET = -100  # what cross-entropy ignores
ROUNDS = 8  # of the Feistel network


class TokenStream:
    """One split as a flat sequence of token ids, read from memory-mapped Arrow buffers without copying them.

    `chunks` are the ids (N,) of consecutive stretches, `length` how many of them count (the last row may be padded).
    """

    def __init__(self, chunks: list[np.ndarray], length: int):
        ends = np.minimum(np.cumsum([len(chunk) for chunk in chunks]), length)  # (chunks,)
        self._chunks = chunks
        self._starts = np.concatenate([[0], ends])  # (chunks + 1,)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def windows(self, offsets: np.ndarray, targets: np.ndarray, block_size: int) -> np.ndarray:
        """Ids (B, block_size + 1) int64: those from offsets (B,) on, targets (B,) + 1 of them; beyond, NO_TARGET.

        The stream is a circle: its first token comes after its last.
        """
        first = self._starts.searchsorted(offsets, side="right") - 1  # the chunk in which each window starts
        at = offsets - self._starts[first]
        if len(offsets) and (offsets + block_size < self._starts[first + 1]).all() and (targets == block_size).all():
            places = zip(first.tolist(), at.tolist(), strict=True)
            slices = [self._chunks[chunk][start : start + block_size + 1] for chunk, start in places]
            return np.concatenate(slices, dtype=np.int64).reshape(len(offsets), block_size + 1)
        windows = np.full((len(offsets), block_size + 1), NO_TARGET, dtype=np.int64)
        for window, chunk, start, count in zip(windows, first.tolist(), at.tolist(), targets.tolist(), strict=True):
            self._fill(window[: count + 1], chunk, start)
        return windows

    def _fill(self, window: np.ndarray, chunk: int, at: int) -> None:
        """A window, which may go on in other chunks, and from the end of the stream to its beginning."""
        filled = 0
        while filled < len(window):
            length = self._starts[chunk + 1] - self._starts[chunk]
            part = self._chunks[chunk][at : min(length, at + len(window) - filled)]
            window[filled : filled + len(part)] = part
            filled += len(part)
            chunk, at = (chunk + 1) % len(self._chunks), 0


def open_stream(data_dir: str | Path, split: str) -> TokenStream:
    """The `train` or `val` split of a prepared data_dir."""
    length = json.loads((Path(data_dir) / "prepared.json").read_text())["tokens"][split]
    rows = load_from_disk(Path(data_dir) / split).data.column("input_ids").chunks
    return TokenStream([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in rows], length)


def training_windows(
    kind: str, seed: int, step: int, count: int, stream_length: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` windows of an optimizer step: offsets and numbers of targets, each (count,) int64.

    `random` draws any offset, with replacement. Philox is counter-based: the step is its counter, so step 10**6 costs
    what step 0 does. Raw 64-bit draws are the same in every version of NumPy; the remainder's bias is below 2**-30.
    (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC11.)

    `epoch` goes through the windows of one epoch after the other, see epoch_windows, and a step may take from several.
    """
    if kind == "random":
        draws = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(count)
        return (draws % np.uint64(stream_length - block_size)).astype(np.int64), np.full(count, block_size)
    windows = -(-stream_length // block_size)
    offsets, targets = [], []
    first, end = step * count, (step + 1) * count
    while first < end:
        epoch, place = divmod(first, windows)
        taken = min(windows - place, end - first)
        for parts, part in zip(
            (offsets, targets),
            epoch_windows(seed, epoch, np.arange(place, place + taken), stream_length, block_size),
            strict=True,
        ):
            parts.append(part)
        first += taken
    return np.concatenate(offsets), np.concatenate(targets)


def epoch_windows(
    seed: int, epoch: int, places: np.ndarray, stream_length: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The windows at some places (B,) in the order of an epoch: offsets and numbers of targets, each (B,) int64.

    The stream is a circle, cut from a random token on into windows side by side, of which the last may be short: each
    token is a target exactly once. Their order is a permutation that is computed place by place.
    """
    windows = -(-stream_length // block_size)
    phase, *keys = np.random.Philox(key=seed, counter=[0, epoch, 1, 0]).random_raw(1 + ROUNDS)
    window = permute(places, windows, keys)
    offsets = (int(phase) % stream_length + window * block_size) % stream_length
    targets = np.minimum(block_size, stream_length - window * block_size)
    return offsets, targets


def permute(places: np.ndarray, count: int, keys: list[np.uint64]) -> np.ndarray:
    """Where a keyed permutation of range(count) takes some of its members: (B,) int64 to (B,) int64.

    A Feistel network permutes the numbers of as many bits as count takes; whoever it leads out of the range goes
    through it again until he is back, twice on average at most. (Black and Rogaway, Ciphers with arbitrary finite
    domains; CT-RSA 2002.) The rounds mix by the finalizer of SplitMix64.
    """
    bits = max(count - 1, 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64((1 << width) - 1) for width in (bits // 2, bits - bits // 2))
    values = places.astype(np.uint64)
    astray = np.ones(len(values), dtype=bool)
    while astray.any():
        low, high = values[astray] & low_mask, values[astray] >> low_bits
        for i, key in enumerate(keys):
            if i % 2:
                low ^= mix(high ^ key) & low_mask
            else:
                high ^= mix(low ^ key) & high_mask
        values[astray] = high << low_bits | low
        astray = values >= count
    return values.astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
    """A hash of 64-bit numbers. (Steele et al., Fast splittable pseudorandom number generators; OOPSLA 2014.)"""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def evaluation_windows(stream_length: int, block_size: int, most_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to evaluate on, side by side, so that every token but the first is a target exactly once.

    Offsets and numbers of targets, each (windows,) int64; the last window may be short. Where they hold more than
    most_tokens targets (0: no limit), as many as that are taken, evenly spaced.
    """
    count = wanted = -(-(stream_length - 1) // block_size)
    if most_tokens:
        wanted = min(count, -(-most_tokens // block_size))
    offsets = np.arange(wanted) * count // max(wanted, 1) * block_size
    return offsets, np.minimum(block_size, stream_length - 1 - offsets)
