"""Character-level tokenizers: one token for each character of a text, in nanoGPT's order."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .documents import read_file
from .fast import END_OF_TEXT, fast_tokenizer


def characters_of(texts: Iterable[str]) -> list[str]:
    """The characters that the texts hold, sorted."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    return [chr(code) for code in np.flatnonzero(seen)]


def train_char_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the sorted characters of the texts, then 256 bytes, then <|endoftext|>.

    A character that the texts do not hold is spelled by its UTF-8 bytes, so every string round-trips. It is a BPE
    without merges: the one model of the library that falls back to bytes.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(characters_of(texts) + byte_tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return fast_tokenizer(tokenizer)


def read_char_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The characters of a text file and no other token, as nanoGPT has them: what models trained on its .bin know."""
    characters = characters_of(text for text, _ in read_file(path, "text"))
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False)
