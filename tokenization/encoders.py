"""Text to token ids, by the fastest way that gives exactly the tokenizer's own.

    characters                                  a table of all code points
    byte-level BPE on a pattern of words        gigatoken if it is installed, else tiktoken; both only for patterns and
    that they know                              vocabularies for which they give the same ids
    any other                                   the `tokenizers` library, in batches

Text that spells a special token stays text, whichever way it goes.
"""

import json
import re
from functools import cached_property
from typing import Protocol

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models

# GPT-2's words as OpenAI and the `tokenizers` library spell them, and as tiktoken does: the same words of every text.
LIBRARY_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_WORDS = {
    LIBRARY_WORDS,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# Words of later models (Llama 3, Qwen 2) that all libraries cut alike, which a test proves.
OTHER_WORDS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
}
MISSING = 2**32 - 1  # in a table: no token for this character
# 0xFF is in no UTF-8 text, so a vocabulary may lack a token for it. Its names in a vocabulary of characters, and in
# GPT-2's letters for bytes:
UNUSED_BYTE, UNUSED_LETTER = "<0xFF>", "ÿ"
LONG_SPACE = re.compile(r"\s{65536}")  # what overflows tiktoken's stack, well before it does
LONG_WORD = re.compile(r"\S{65536}")  # on which tiktoken takes minutes
RENEWAL = 2**27  # characters after which gigatoken starts afresh: its cache of words has no bound of its own


class Encoder(Protocol):
    """Texts to ids. `cuts` says whether the pieces of a text, cut as read_text cuts, have the ids of the whole."""

    cuts: bool

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text. Raises ValueError if the tokenizer cannot encode a text."""

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        """How many characters have no token of their own: spelled by bytes or, unless they are white space, lost."""


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
        codes = (np.frombuffer(text.encode("utf-32-le"), dtype="<u4") for text in texts)
        return sum(int((self.table[each] == MISSING).sum()) for each in codes) if len(self.byte_ids) else 0


class LibraryEncoder:
    """Any tokenizer, by the `tokenizers` library itself."""

    cuts = False

    def __init__(self, tokenizer_json: str):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        model = json.loads(tokenizer_json)["model"]
        unknown = model.get("unk_token")
        self.unknown_id = self.tokenizer.token_to_id(unknown) if unknown else model.get("unk_id")
        # without an unknown token, a BPE drops the characters that it does not know, unless it is one of bytes
        self.drops = model["type"] == "BPE" and not unknown and not model["byte_fallback"]
        self.drops = self.drops and not set(byte_letters()) - {UNUSED_LETTER} <= model["vocab"].keys()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library has no other for a word that is not in a vocabulary
            raise ValueError(f"the tokenizer cannot encode some of the text: {str(error)[:300]}") from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        suspects = [
            text for text, each in zip(texts, ids, strict=True) if self.drops or (each == self.unknown_id).any()
        ]
        return sum(map(self.count_lost, suspects))

    def count_lost(self, text: str) -> int:
        """How many characters of a text, white space aside, are in no token, or in one that stands for anything."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        kept = np.zeros(len(text), dtype=bool)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            kept[start:end] = token != self.unknown_id
        return sum(not text[i].isspace() for i in np.flatnonzero(~kept))


class TiktokenEncoder:
    """Byte-level BPE, by tiktoken; only deserts of white space, on which it overflows, are left to the library."""

    def __init__(self, words: str, ranks: dict[bytes, int], tokenizer_json: str):
        self.words, self.ranks, self.tokenizer_json = words, ranks, tokenizer_json
        self.cuts = words in GPT2_WORDS

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding("", pat_str=self.words, mergeable_ranks=self.ranks, special_tokens={})

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> np.ndarray:
        if has_long_run(text):
            return LibraryEncoder(self.tokenizer_json).encode([text])[0]
        return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32)

    def count_unknowns(self, texts: list[str], ids: list[np.ndarray]) -> int:
        return 0  # every byte is a token


class GigatokenEncoder(TiktokenEncoder):
    """Byte-level BPE, by gigatoken, ten times as fast: it remembers the words that it has seen."""

    def __init__(self, words: str, ranks: dict[bytes, int], spec: dict):
        cuts = words in GPT2_WORDS
        spec["added_tokens"] = []  # text that spells one stays text
        if cuts:  # gigatoken knows GPT-2's words by this name
            spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
            spec["pre_tokenizer"]["use_regex"] = True
        super().__init__(words, ranks, json.dumps(spec))
        self.start()

    def start(self) -> None:
        import gigatoken

        self.tokenizer_of_words, self.encoded = gigatoken.Tokenizer.from_json(self.tokenizer_json), 0

    def encode_text(self, text: str) -> np.ndarray:
        self.encoded += len(text)
        if self.encoded > RENEWAL:
            self.start()
        return self.tokenizer_of_words.encode(text)


def has_long_run(text: str) -> bool:
    """Whether white space or a word goes on for 65,536 characters, or nearly.

    One character in 2**15 is looked at, because such a run cannot avoid two of them.
    """
    samples = [sample.isspace() for sample in text[:: 2**15]]
    pairs = set(zip(samples, samples[1:], strict=False))
    spaces = (True, True) in pairs and LONG_SPACE.search(text)
    return bool(spaces or (False, False) in pairs and LONG_WORD.search(text))


def make_encoder(tokenizer_json: str, fastest: bool = True) -> Encoder:
    """The fastest encoder that gives exactly the ids of a tokenizer.json; not `fastest`: without gigatoken."""
    spec = json.loads(tokenizer_json)
    if all(token["special"] for token in spec["added_tokens"]) and spec["normalizer"] is None:
        model, words = spec["model"], words_of(spec["pre_tokenizer"])
        if model["type"] == "BPE" and not model["merges"] and model["byte_fallback"] and words == "":
            characters = {token: i for token, i in model["vocab"].items() if len(token) == 1}
            byte_ids = [model["vocab"].get(f"<0x{byte:02X}>") for byte in range(0xFF)]
            if None not in byte_ids:
                return TableEncoder(characters, byte_ids)
        alone = model.get("unk_token") not in model["vocab"]
        if model["type"] == "WordLevel" and words == r"[\s\S]" and alone and set(map(len, model["vocab"])) == {1}:
            return TableEncoder(model["vocab"], None)
        if model["type"] == "BPE" and words in GPT2_WORDS | OTHER_WORDS:
            ranks = ranks_of(model, {token["content"] for token in spec["added_tokens"]})
            if ranks and fastest:
                try:
                    return GigatokenEncoder(words, ranks, spec)
                except (ImportError, RuntimeError):  # it is not installed, or knows no such pattern
                    pass
            if ranks:
                return TiktokenEncoder(words, ranks, tokenizer_json)
    return LibraryEncoder(tokenizer_json)


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
    """The tokens of a byte-level BPE as tiktoken takes them, bytes to id; None if it would give other ids.

    The library merges the pair that stands first in the list of merges, tiktoken the one whose joint token has the
    lowest id. These are the same if ids never fall along the list, and if the library brings each token's own letters
    down to that token: up to each merge the two agree on every text by induction, and a stretch whose border no merge
    has crossed is merged as if it stood alone.
    """
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if any(model.get(key) for key in unlike) or (model.get("ignore_merges") and special & model["vocab"].keys()):
        return None
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary = {token: i for token, i in model["vocab"].items() if token not in special}
    if not set().union(*vocabulary) <= letters.keys() or not letters.keys() - {UNUSED_LETTER} <= vocabulary.keys():
        return None
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = [vocabulary.get(left + right, -1) for left, right in merges]
    single = {i for token, i in vocabulary.items() if token in letters}
    if made != sorted(made) or single.union(made) != set(vocabulary.values()):
        return None
    library = models.BPE(vocab=vocabulary, merges=merges)
    if any(len(library.tokenize(token)) != 1 for token in vocabulary):
        return None
    table = str.maketrans({letter: chr(byte) for letter, byte in letters.items()})
    vocabulary.pop(UNUSED_LETTER, None)  # so that two vocabularies, one of which lacks it, are the same
    return {token.translate(table).encode("latin-1"): i for token, i in vocabulary.items()}


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself if it prints, else the next one from U+0100 on."""
    prints = [33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 for byte in range(256)]
    return [chr(byte if prints[byte] else 256 + byte - sum(prints[:byte])) for byte in range(256)]


def count_bytes(tokenizer) -> np.ndarray:
    """How many bytes of text each token of a PreTrainedTokenizerFast stands for (V,) int64; special ones for none."""
    encoder, vocabulary = make_encoder(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    if isinstance(encoder, TiktokenEncoder):  # its tokens are spelled in letters that stand for bytes
        sizes = [len(token) for token in vocabulary]
    elif isinstance(encoder, TableEncoder):
        sizes = [len(token.encode()) if len(token) == 1 else 1 for token in vocabulary]
    else:
        sizes = [len(tokenizer.decode([i]).encode()) for i in vocabulary.values()]
    result = np.zeros(len(tokenizer), dtype=np.int64)
    result[list(vocabulary.values())] = sizes
    result[tokenizer.all_special_ids] = 0
    return result
