"""Text to token ids, by the fastest way that gives exactly the tokenizer's own.

    characters                                     a table of all code points
    byte-level BPE on a pattern tiktoken knows     tiktoken, where its algorithm is proven to give the same ids
    any other                                      the `tokenizers` library, in batches

Text that spells a special token stays text, whichever way it goes.
"""

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from typing import NamedTuple, Protocol

import numpy as np
import tiktoken
from tokenizers import Tokenizer

# GPT-2's words as OpenAI and the `tokenizers` library spell them, and as tiktoken does. See read_text.
LIBRARY_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_WORDS = {
    LIBRARY_WORDS,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
UNLOOKING_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
WHITE_SPACE = np.zeros(0x3002, dtype=bool)  # what \s matches; the last place stands for all beyond
WHITE_SPACE[[*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]] = True
WHITE_SPACE[[0x2028, 0x2029, 0x202F, 0x205F, 0x3000]] = True
SPARSE = 100  # characters in a part at least, on average, for a text to be cut at its spaces
# Words of later models (Llama 3, Qwen 2) that both libraries cut alike, which a test proves.
OTHER_WORDS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
}
MISSING = 2**32 - 1  # in a table: no token for this character
LONG_SPACE = re.compile(r"\s{65536}")  # what overflows tiktoken's stack, well before it does


class Encoder(Protocol):
    """Texts to ids. `cuts` says whether the pieces of a text, cut as read_text cuts, have the ids of the whole."""

    cuts: bool

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text."""

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        """How many characters, or words, are no tokens of their own: spelled by bytes, or lost in an unknown token."""


class TableEncoder:
    """Characters: one look in a table each; those without a token are spelled by their bytes."""

    cuts = True

    def __init__(self, characters: dict[str, int], byte_ids: list[int] | None):
        self.table = np.full(0x110000, MISSING, dtype=np.uint32)
        self.table[[ord(character) for character in characters]] = list(characters.values())
        self.byte_ids = np.array(byte_ids or [], dtype=np.uint32)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self.table[codes]
        missing = ids == MISSING
        if not missing.any():
            return ids
        spelled = codes[missing].astype("<u4").tobytes().decode("utf-32-le")
        if not len(self.byte_ids):
            raise ValueError(f"the tokenizer has no token for {spelled[0]!r}, nor for the bytes that spell it")
        lengths = np.ones(len(codes), dtype=np.int64)
        lengths[missing] = [len(character.encode()) for character in spelled]
        ids, missing = np.repeat(ids, lengths), np.repeat(missing, lengths)
        ids[missing] = self.byte_ids[np.frombuffer(spelled.encode(), dtype=np.uint8)]
        return ids

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        if not len(self.byte_ids):
            return 0
        return sum(
            int((self.table[np.frombuffer(t.encode("utf-32-le"), dtype="<u4")] == MISSING).sum()) for t in texts
        )


class LibraryEncoder:
    """Any tokenizer, by the `tokenizers` library itself."""

    cuts = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self.unknown_id = self.tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        return 0 if self.unknown_id is None else sum(int((each == self.unknown_id).sum()) for each in ids)


class TiktokenEncoder:
    """Byte-level BPE, by tiktoken; only a desert of white space, on which it overflows, is left to the library.

    With `cuts`, words are GPT-2's. Their pattern looks ahead for one thing, whether white space goes on, and a pattern
    that does not is nearly twice as fast. It gives the same words where no white space but a single one stands before
    something else: so a text is cut there, unless it would be cut to pieces, as program code with its indents.
    """

    def __init__(self, words: str, ranks: dict[bytes, int], tokenizer: Tokenizer):
        self.words, self.ranks, self.cuts = words, ranks, words in GPT2_WORDS
        self.tokenizer = tokenizer
        pattern = LIBRARY_WORDS if self.cuts else words
        self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        if self.cuts:
            self.unlooking = tiktoken.Encoding("", pat_str=UNLOOKING_WORDS, mergeable_ranks=ranks, special_tokens={})

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> np.ndarray:
        if self.cuts and (parts := cut_at_spaces(text)):
            ids = chain.from_iterable(map(self.unlooking.encode_ordinary, parts))
            return np.fromiter(ids, dtype=np.uint32)
        if has_long_space(text):
            return LibraryEncoder(self.tokenizer).encode([text])[0]
        return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32)

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        return 0  # every byte is a token


def cut_at_spaces(text: str) -> list[str]:
    """A text, cut before the last of several white spaces that something else follows; [] if that is too often."""
    for part in (text[: 2**12], text):  # the beginning tells most that would be cut to pieces
        codes = np.frombuffer(*((part.encode(), "u1") if part.isascii() else (part.encode("utf-32-le"), "<u4")))
        space = WHITE_SPACE[codes if part.isascii() else np.minimum(codes, len(WHITE_SPACE) - 1)]
        places = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
        if len(places) * SPARSE > len(part):
            return []
    bounds = [0, *places.tolist(), len(text)]
    return [text[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def has_long_space(text: str) -> bool:
    """Whether LONG_SPACE matches, or nearly; one character in 2**15 is looked at, as such a run cannot avoid two."""
    samples = text[:: 2**15]
    return any(a.isspace() and b.isspace() for a, b in zip(samples, samples[1:], strict=False)) and bool(
        LONG_SPACE.search(text)
    )


def make_encoder(tokenizer: Tokenizer) -> Encoder:
    """The fastest encoder that gives exactly the ids of a tokenizer."""
    spec = json.loads(tokenizer.to_str())
    if all(token["special"] for token in spec["added_tokens"]) and spec["normalizer"] is None:
        model, words = spec["model"], words_of(spec["pre_tokenizer"])
        if model["type"] == "BPE" and not model["merges"] and model["byte_fallback"] and words == "":
            characters = {token: i for token, i in model["vocab"].items() if len(token) == 1}
            byte_ids = [model["vocab"].get(f"<0x{byte:02X}>") for byte in range(256)]
            if None not in byte_ids:
                return TableEncoder(characters, byte_ids)
        alone = model.get("unk_token") not in model["vocab"]
        if model["type"] == "WordLevel" and words == r"[\s\S]" and alone and set(map(len, model["vocab"])) == {1}:
            return TableEncoder(model["vocab"], None)
        if model["type"] == "BPE" and words in GPT2_WORDS | OTHER_WORDS:
            ranks = ranks_of(model, {token["content"] for token in spec["added_tokens"]})
            if ranks:
                return TiktokenEncoder(words, ranks, tokenizer)
    return LibraryEncoder(tokenizer)


def words_of(pre_tokenizer: dict | None) -> str | None:
    """The pattern by which a pre-tokenizer cuts text into words; "" if it does not cut, None if it does more."""
    match pre_tokenizer:
        case None:
            return ""
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return LIBRARY_WORDS
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def ranks_of(model: dict, special: set[str]) -> dict[bytes, int] | None:
    """The tokens of a byte-level BPE as tiktoken takes them, bytes to id; None where it would give other ids.

    The library merges the pair that stands first in the list of merges, tiktoken the one whose joint token has the
    lowest id. These are the same if ids never fall along the list, and if each token's own bytes, merged by what
    stands before it, come down to a pair that the list has for it: up to that merge the two agree on every text by
    induction, and a stretch whose border no merge has crossed is merged as if it stood alone.
    """
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if any(model.get(key) for key in unlike) or (model.get("ignore_merges") and special & model["vocab"].keys()):
        return None
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary = {token: i for token, i in model["vocab"].items() if token not in special}
    if not set().union(*vocabulary) <= letters.keys() or not letters.keys() <= vocabulary.keys():
        return None
    ranks = {bytes([byte]): vocabulary[letter] for letter, byte in letters.items()}
    merged, found, last = {}, set(), -1
    for left, right in (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]):
        pair = [bytes(letters[letter] for letter in part) for part in (left, right)]
        token, i = b"".join(pair), vocabulary.get(left + right, -1)
        if i < 0:
            return None
        if i > last:
            expected = merge_bytes(token, merged)
            merged[token] = last = i
        if pair == expected:
            found.add(token)
    complete = len(found) == len(merged) == len(vocabulary) - 256
    return ranks | merged if complete else None


def merge_bytes(token: bytes, merged: dict[bytes, int]) -> list[bytes]:
    """The parts to which tiktoken's algorithm brings the bytes of a token, the lowest id first."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pairs = [
            (merged.get(left + right, MISSING), i)
            for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
        ]
        lowest, i = min(pairs, default=(MISSING, 0))
        if lowest == MISSING:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it prints, else the next one from U+0100 on."""
    prints = [33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 for byte in range(256)]
    return [chr(byte if prints[byte] else 256 + byte - sum(prints[:byte])) for byte in range(256)]


class Encoded(NamedTuple):
    """What a stretch of text became: ids (N,), and how much of what it was."""

    ids: np.ndarray
    bytes: int
    documents: int
    unknowns: int


def encode_pieces(
    encoder: Encoder, pieces: list[tuple[str, str, bool]], end_id: int | None, id_type: str
) -> dict[str, Encoded]:
    """The ids of pieces of text (split, text, whether it ends a document), joined split by split.

    end_id, where there is one, follows each document.
    """
    result = {}
    ending = np.array([] if end_id is None else [end_id], dtype=id_type)
    for split in ("train", "val"):
        texts = [text for which, text, _ in pieces if which == split]
        ends = [ends for which, _, ends in pieces if which == split]
        encoded = encoder.encode(texts)
        ids = [
            part for ids, end in zip(encoded, ends, strict=True) for part in (ids.astype(id_type), ending[: end * 1])
        ]
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        unknowns = encoder.count_unknowns(texts, encoded)
        result[split] = Encoded(np.concatenate([ending[:0], *ids]), size, sum(ends), unknowns)
    return result


def encode_batches(
    batches: Iterable[tuple[list, dict | None]], encoder: Encoder, end_id: int | None, id_type: str, num_proc: int
) -> Iterator[tuple[dict[str, Encoded], dict | None]]:
    """Batches of pieces, encoded in their order, each with the state that came with it; by num_proc processes."""
    if num_proc == 1:
        for pieces, state in batches:
            yield encode_pieces(encoder, pieces, end_id, id_type), state
        return
    # Processes, as each text costs Python some work too; spawned, as threads of the libraries do not survive a fork.
    pool = ProcessPoolExecutor(num_proc, get_context("spawn"), initializer=start_worker, initargs=(encoder,))
    pending = deque()
    try:
        for pieces, state in batches:
            pending.append((pool.submit(encode_in_worker, pieces, end_id, id_type), state))
            if len(pending) > 2 * num_proc:
                done, state = pending.popleft()
                yield done.result(), state
        while pending:
            done, state = pending.popleft()
            yield done.result(), state
    except BrokenProcessPool:
        raise ValueError(f"num_proc={num_proc}: a process that tokenizes was killed, for want of memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(encoder: Encoder) -> None:
    global worker_encoder
    worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def encode_in_worker(*arguments) -> dict[str, Encoded]:
    return encode_pieces(worker_encoder, *arguments)
