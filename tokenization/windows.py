"""Windows on the token stream of a data_dir: which ones a step trains on, and their ids.

A window is up to T + 1 consecutive tokens: T inputs and, one further, T targets. Which windows a step sees is a pure
function of the seed and the step, so any step can be reached at once and on any number of processes.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import load_dataset, load_from_disk
from numpy.lib.stride_tricks import as_strided

NO_TARGET = -100  # what cross-entropy ignores
ROUNDS = 8  # of the Feistel network


@dataclass(frozen=True)
class Windows:
    """Some windows of a stream: where each begins, and how many targets it has. Both (N,) int64."""

    offsets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def padded(self, multiple: int) -> "Windows":
        """These windows, then empty ones (of length 0) until their number is a multiple of `multiple`."""
        empty = np.zeros(-len(self) % multiple, dtype=np.int64)
        return Windows(np.append(self.offsets, empty), np.append(self.lengths, empty))

    def shares(self, batch_size: int, processes: int, rank: int) -> Iterator["Windows"]:
        """The micro-batches of process `rank`, in order: `batch_size` windows for each process in turn, and again.

        Side by side, the micro-batches of all processes are those of a single process, in its order. The number of
        windows must be a multiple of batch_size * processes.
        """
        shape = (-1, processes, batch_size)
        for offsets, lengths in zip(self.offsets.reshape(shape), self.lengths.reshape(shape), strict=True):
            yield Windows(offsets[rank], lengths[rank])


class TokenStream:
    """One split as a flat sequence of token ids, read from memory-mapped Arrow buffers without copying them.

    `chunks` are the ids (N,) of consecutive stretches, `length` how many of them count (in data_dirs of an earlier
    layout the last row is padded), `end_id` is the end-of-text token, if there is one.
    """

    def __init__(self, chunks: list[np.ndarray], length: int, end_id: int | None = None):
        chunks = [chunk for chunk in chunks if len(chunk)]  # an empty one may have any address: see memory_of
        ends = np.minimum(np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64), length)  # (chunks,)
        self._starts = np.concatenate([[0], ends])  # (chunks + 1,)
        self._chunks = [chunk[:size] for chunk, size in zip(chunks, np.diff(self._starts), strict=True)]
        self._length = length
        self._end_id = end_id
        self._memory: dict[int, np.ndarray] = {}  # by the size of a window: see memory_of
        self._documents: dict[int, Windows] = {}  # by block_size: what document_windows has found

    def __reduce__(self) -> tuple:
        return TokenStream, (self._chunks, self._length, self._end_id)  # in a copy, the chunks have other addresses

    def __len__(self) -> int:
        return self._length

    def batch(self, windows: Windows, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (B, block_size) and targets (B, block_size), both int64: a target is the token after its input.

        Beyond the length of a window, inputs are 0 and targets NO_TARGET.
        """
        chunks = self._starts.searchsorted(windows.offsets, side="right") - 1  # in which the windows start, (B,)
        ends = windows.offsets + block_size + 1
        if (windows.lengths == block_size).all() and (ends <= self._starts[chunks + 1]).all():
            at = windows.offsets - self._starts[chunks] + self._places[chunks]
            ids = self.memory_of(block_size + 1)[at]  # one copy of two or four bytes an id: (B, block_size + 1)
            return ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        # some window is short, or goes on in another chunk
        ids = self.windows(windows.offsets, windows.lengths, block_size)
        return ids[:, :-1].clip(min=0), ids[:, 1:].copy()

    @cached_property
    def _places(self) -> np.ndarray:
        """Where the chunks are in memory: how many ids lie between the lowest chunk and each of them. (chunks,)"""
        addresses = np.array([chunk.ctypes.data for chunk in self._chunks])
        return (addresses - addresses.min()) // self._chunks[0].itemsize

    def memory_of(self, size: int) -> np.ndarray:
        """Row i is the `size` ids that lie in memory from place i on, counted in ids from the lowest chunk.

        It is a view, over all memory from the lowest chunk to the highest. So one gather takes windows out of many
        chunks, in half the time of a slice for each window. Only rows that lie in a chunk may be read.
        """
        if size not in self._memory:
            count = int(self._places.max()) + max(map(len, self._chunks))
            ids = self._chunks[self._places.argmin()]
            self._memory[size] = as_strided(ids, (count, size), (ids.itemsize, ids.itemsize), writeable=False)
        return self._memory[size]

    def windows(self, offsets: np.ndarray, lengths: np.ndarray, block_size: int) -> np.ndarray:
        """Ids (B, block_size + 1) int64: those from offsets (B,) on, lengths (B,) + 1 of them; beyond, NO_TARGET.

        The stream is a circle: its first token comes after its last.
        """
        first = self._starts.searchsorted(offsets, side="right") - 1  # the chunk in which each window starts
        at = offsets - self._starts[first]
        windows = np.full((len(offsets), block_size + 1), NO_TARGET, dtype=np.int64)
        for window, chunk, start, count in zip(windows, first.tolist(), at.tolist(), lengths.tolist(), strict=True):
            self._fill(window[: count + 1], chunk, start)
        return windows

    def _fill(self, window: np.ndarray, chunk: int, at: int) -> None:
        """A window, which may go on in other chunks, and from the end of the stream to its beginning."""
        filled = 0
        while filled < len(window):
            part = self._chunks[chunk][at : at + len(window) - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)
            chunk, at = (chunk + 1) % len(self._chunks), 0

    def read(self, start: int, end: int) -> np.ndarray:
        """The ids from start on, before end."""
        first, last = self._starts.searchsorted([start, end - 1], side="right") - 1
        parts = [
            self._chunks[i][max(start - self._starts[i], 0) : end - self._starts[i]] for i in range(first, last + 1)
        ]
        return np.concatenate(parts)

    def document_windows(self, block_size: int) -> Windows:
        """Windows side by side over the stream, each beginning where a document does, or going on with a long one.

        A window ends with the last document end that is within block_size tokens. If there is none, the window is full
        and the next one goes on from there. One pass over the stream finds the documents; the result is kept.
        """
        if block_size not in self._documents:
            found = [
                np.flatnonzero(chunk == self._end_id) + start + 1
                for chunk, start in zip(self._chunks, self._starts[:-1], strict=True)
            ]
            inner = np.concatenate(found)
            ends = np.unique(np.append(inner[inner < len(self)], len(self)))  # (documents,), positions in the stream
            starts = np.append(0, ends[:-1])
            full = (ends - starts - 1) // block_size  # windows that a document fills alone, (documents,)
            # the document that begins the window after the last one that this document is in
            follower = ends.searchsorted(starts + full * block_size + block_size, side="right").tolist()
            leaders, document = [], 0
            while document < len(ends):
                leaders.append(document)
                document = follower[document]
            counts = full[leaders] + 1  # windows from a leader to the next, (leaders,)
            within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            offsets = np.repeat(starts[leaders], counts) + within * block_size
            self._documents[block_size] = Windows(offsets, np.diff(np.append(offsets, len(self))))
        return self._documents[block_size]


def open_stream(data_dir: str | Path, split: str, end_id: int | None = None) -> TokenStream:
    """The `train` or `val` split of a prepared data_dir."""
    folder = Path(data_dir)
    length = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["tokens"][split]
    shared = not (folder / split).is_dir()  # as push_to_hub has shared it
    rows = load_dataset(str(folder), split=split) if shared else load_from_disk(folder / split)
    return TokenStream(views_of(rows.data.column("input_ids")), length, end_id)


def views_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The ids of a column of lists, a flat array for each of its chunks, without copying them."""
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]


def training_windows(stream: TokenStream, *, order: str, seed: int, step: int, count: int, block_size: int) -> Windows:
    """The `count` windows of an optimizer step.

    `random` draws any offset, with replacement. Philox is counter-based: the step is its counter, so step 10**6 costs
    what step 0 does. Raw 64-bit draws are the same in every version of NumPy; the remainder's bias is below 2**-30.
    (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC11.)

    `epoch` and `documents` go through the windows of one epoch after the other, and a step may take from several: see
    epoch_windows and TokenStream.document_windows.
    """
    if order == "random":
        draws = random_numbers(seed, [0, step, 0, 0], count)
        offsets = (draws % np.uint64(len(stream) - block_size)).astype(np.int64)
        return Windows(offsets, np.full(count, block_size))
    whole = stream.document_windows(block_size) if order == "documents" else None
    per_epoch = len(whole) if whole else -(-len(stream) // block_size)
    parts = []
    first, end = step * count, (step + 1) * count
    while first < end:
        epoch, place = divmod(first, per_epoch)
        taken = min(per_epoch - place, end - first)
        places = np.arange(place, place + taken)
        if whole:
            chosen = permute(places, per_epoch, epoch_keys(seed, epoch)[1:])
            parts.append(Windows(whole.offsets[chosen], whole.lengths[chosen]))
        else:
            parts.append(epoch_windows(seed, epoch, places, len(stream), block_size))
        first += taken
    return Windows(np.concatenate([part.offsets for part in parts]), np.concatenate([part.lengths for part in parts]))


def epoch_windows(seed: int, epoch: int, places: np.ndarray, stream_length: int, block_size: int) -> Windows:
    """The windows at some places (B,) in the order of an epoch.

    The stream is a circle, cut from a random token on into windows side by side, of which the last may be short: each
    token is a target exactly once. Their order is a permutation that is computed place by place.
    """
    windows = -(-stream_length // block_size)
    phase, *keys = epoch_keys(seed, epoch)
    window = permute(places, windows, keys)
    offsets = (int(phase) % stream_length + window * block_size) % stream_length
    return Windows(offsets, np.minimum(block_size, stream_length - window * block_size))


def epoch_keys(seed: int, epoch: int) -> np.ndarray:
    """The random numbers of an epoch: where it cuts the stream, and the keys of the order."""
    return random_numbers(seed, [0, epoch, 1, 0], 1 + ROUNDS)


def random_numbers(seed: int, counter: list[int], count: int) -> np.ndarray:
    """What a new Philox with this key and this counter (4,) puts out first: (count,) uint64."""
    generator = philox(seed)
    state = generator.state  # setting it takes a third of the time that a new generator takes
    state["state"]["counter"], state["buffer_pos"] = np.array(counter, dtype=np.uint64), len(state["buffer"])
    generator.state = state
    return generator.random_raw(count)


@lru_cache(maxsize=1)
def philox(seed: int) -> np.random.Philox:
    return np.random.Philox(key=seed)


def permute(places: np.ndarray, count: int, keys: Iterable[np.uint64]) -> np.ndarray:
    """Where a keyed permutation of range(count) takes some of its members: (B,) int64 to (B,) int64.

    A Feistel network permutes the numbers of as many bits as count takes; a number that lands outside the range is
    mapped again until it lands inside, twice on average at most. (Black and Rogaway, Ciphers with arbitrary finite
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


def evaluation_windows(stream_length: int, *, block_size: int, tokens: int) -> Windows:
    """Windows to evaluate on, side by side, so that every token but the first is a target exactly once.

    The last window may be short. If they hold more than `tokens` targets (0: no limit), as many windows as hold that
    many are taken, evenly spaced.
    """
    count = wanted = -(-(stream_length - 1) // block_size)
    if tokens:
        wanted = min(count, -(-tokens // block_size))
    offsets = np.arange(wanted) * count // max(wanted, 1) * block_size
    return Windows(offsets, np.minimum(block_size, stream_length - 1 - offsets))
