"""A character-level tokenizer: one token for each character of the corpus, in nanoGPT's order."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from .fast import END_OF_TEXT, fast_tokenizer


def train_char_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the sorted characters of the texts, then 256 bytes, then <|endoftext|>.

    A character that the texts do not hold is spelled by its UTF-8 bytes, so every string round-trips. It is a BPE
    without merges: the one model of the library that falls back to bytes.
    """
    characters = sorted(set().union(*texts))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(characters + byte_tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return fast_tokenizer(tokenizer)
