"""Which tokenizer a flag names: made from the corpus, GPT-2's, of a folder or Hub id, or the characters of a file.

Each is an ordinary fast tokenizer, which AutoTokenizer loads with no code of ours.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken.load
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .documents import first_line, read_file
from .encoders import UNUSED_BYTE, UNUSED_LETTER, TableEncoder, TiktokenEncoder, make_encoder

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
# The trainer of the `tokenizers` library takes hours for a word of a million letters: it is given such parts. In a
# text without spaces, hardly two parts are alike, and a million characters take two seconds and 50 MB: hence a bound.
LONG_WORD = re.compile(r"\S{1000}")
LONG_WORDS, MENTIONED = 2**24, 2**20  # characters in such parts: the most to learn from, and what is worth a line
# OpenAI's files of GPT-2's merges and tokens, where tiktoken has them from too, and their SHA-256
GPT2_FILES = {
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
}


def named_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer that a flag names, if it is not made from the corpus. Raises ValueError if it cannot be had."""
    if name == "gpt2":
        return make_gpt2_tokenizer()
    if os.path.isfile(name):  # Path raises an error if the name is too long for a file
        return read_char_tokenizer(Path(name))
    return load_tokenizer(name)


def load_tokenizer(name: str, flag: str = "tokenizer", revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the folder or Hub id that a flag names. Raises ValueError if it has no tokenizer."""
    from transformers import AutoTokenizer  # imports torch, which preparing does not need otherwise

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of the Hub, of a broken file, of what a tokenizer_config.json asks for
        if flag == "tokenizer":
            allowed = "give char, bpe, gpt2, a text file, or a folder or Hub id with a tokenizer"
        else:
            allowed = "it must hold a tokenizer"
        raise ValueError(f"{flag}={name}: no tokenizer can be loaded ({first_line(error)}); {allowed}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{flag}={name} has no tokenizer.json, nor what one can be made from")
    if max(tokenizer.get_vocab().values(), default=-1) >= len(tokenizer):
        raise ValueError(f"{flag}={name} has {len(tokenizer)} tokens, but ids beyond that number")
    plain = plain_tokenizer(tokenizer)
    if flag == "tokenizer" and tokenizer.num_special_tokens_to_add():
        added = " ".join(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))
        print(f"tokenizer={name} puts {added} around a text: left out, in training as in prompts", file=sys.stderr)
    return plain


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer as training uses it, so that a prompt gets ids as training has seen them: those of its text.

    It adds no token to a text and has no token_type_ids. A document in the data begins behind the end-of-text token of
    the one before, so this token also begins a text.
    """
    end, names = tokenizer.eos_token, ["input_ids", "attention_mask"]
    adds = tokenizer.num_special_tokens_to_add()
    if not adds and tokenizer.model_input_names == names and end in (None, tokenizer.bos_token):
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # it adds tokens, or moves the borders of tokens in the text, which nothing here uses
    backend.post_processor = None
    special = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special | ({"bos_token": end} if end else {}),
        padding_side="left",  # a batch of prompts is continued on its right
        model_max_length=tokenizer.model_max_length,
        model_input_names=names,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
    )
    plain.name_or_path, plain.chat_template = tokenizer.name_or_path, tokenizer.chat_template
    return plain


def same_tokenizer(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers turn every text into the same ids, as far as that can be seen."""
    backends = [first.backend_tokenizer, second.backend_tokenizer]
    for backend in backends:  # settings that encoding overrides
        backend.no_padding()
        backend.no_truncation()
    if backends[0].to_str() == backends[1].to_str():
        return True
    one, other = (make_encoder(backend.to_str()) for backend in backends)
    if isinstance(one, TableEncoder) and isinstance(other, TableEncoder):
        same = np.array_equal(one.table, other.table) and np.array_equal(one.byte_ids, other.byte_ids)
    elif isinstance(one, TiktokenEncoder) and isinstance(other, TiktokenEncoder):
        same = one.ranks == other.ranks and (one.words == other.words or (one.cuts and other.cuts))
    else:
        same = False
    return same and (len(first), first.eos_token_id) == (len(second), second.eos_token_id)


def check_tokens(
    tokenizer: PreTrainedTokenizerFast, model_tokenizer: PreTrainedTokenizerFast | None, data_dir: str | None
) -> None:
    """Raise ValueError if a model has learned other tokens than those of the data."""
    if model_tokenizer is not None and not same_tokenizer(tokenizer, model_tokenizer):
        name = model_tokenizer.name_or_path
        raise ValueError(
            f"data_dir={data_dir} has other tokens than init_from={name} learned: prepare another data_dir with "
            f"--tokenizer={name}"
        )


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer, with special tokens for the end of a text and for padding; what it decodes is left as it is.

    If one token did both, collators would mask the ends of texts, and no model would learn them. No text in UTF-8 has
    the byte 0xFF, so padding takes the token of this byte: no other id changes, and a model needs no further row.
    """
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    unused = UNUSED_BYTE if UNUSED_BYTE in vocabulary else UNUSED_LETTER
    vocabulary[PADDING] = vocabulary.pop(unused)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        unk_token=END_OF_TEXT,  # as GPT-2's own has it, because some tools fail without one; no text is encoded to it
        padding_side="left",  # a batch of prompts is continued on its right
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Characters: one token for each character of a text, in nanoGPT's order


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
    characters = characters_of(str(text) for text, _ in read_file(path, "text", Counter()))
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level BPE


def byte_level(model: models.BPE) -> Tokenizer:
    """A BPE whose letters stand for bytes, within words as GPT-2 cuts them."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most vocab_size tokens: <|endoftext|>, 256 bytes, then merges by frequency.

    Text is cut into words by GPT-2's pattern first. Every string round-trips, because every byte is a token.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it leaves empty lines on stdout
    )
    tokenizer.train_from_iterator(cut_long_words(texts), trainer)
    return fast_tokenizer(tokenizer)


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut behind every LONG_WORD; beyond LONG_WORDS, such words are left out."""
    taken = 0
    for text in texts:
        start = 0
        for word in LONG_WORD.finditer(text):
            if taken < MENTIONED <= taken + len(word[0]):
                print(
                    f"tokenizer=bpe: the text has words of {len(word[0]):,} characters and more. It learns from the "
                    f"first {LONG_WORDS:,} characters of such words, which takes up to a minute",
                    file=sys.stderr,
                    flush=True,
                )
            yield text[start : word.end() if taken < LONG_WORDS else word.start()]
            taken += len(word[0])
            start = word.end()
        yield text[start:]


def make_gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's 50,257 tokens; raises ValueError if tiktoken can neither find nor fetch them."""
    try:
        merges, tokens = read_gpt2_files()
    except (OSError, ValueError) as error:  # OSError: of the network, or of a folder that may not be written
        raise ValueError(
            f"tokenizer=gpt2: GPT-2's vocabulary is not on this machine, and tiktoken cannot fetch it "
            f"({reason_of(error)}): run this once with a network; or set TIKTOKEN_CACHE_DIR to a folder that was "
            "filled on another machine; or take --tokenizer=bpe, which needs no download"
        ) from None
    _, *lines, _ = merges.split("\n")  # the first line is a version
    pairs = [(left, right) for left, right in map(str.split, lines)]
    tokenizer = byte_level(models.BPE(json.loads(tokens), pairs))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return fast_tokenizer(tokenizer)


def read_gpt2_files() -> tuple[str, str]:
    """GPT-2's merges and tokens, from tiktoken's cache or the web; a line on stderr comes before a download."""
    read_file, said = tiktoken.load.read_file, list[str]()

    def read_aloud(blobpath: str) -> bytes:
        if not said:
            print("fetching GPT-2's vocabulary (1.5 MB) ...", file=sys.stderr, flush=True)
            said.append(blobpath)
        return read_file(blobpath)

    tiktoken.load.read_file = read_aloud  # tiktoken calls it only for what its cache lacks
    try:
        merges, tokens = (tiktoken.load.read_file_cached(*file).decode() for file in GPT2_FILES.items())
    finally:
        tiktoken.load.read_file = read_file
    return merges, tokens


def reason_of(error: Exception) -> str:
    """What went wrong, in one line: of a failed connection, the innermost cause alone."""
    cause = getattr(error.args[0] if error.args else None, "reason", error)
    return f"{type(error).__name__}: {first_line(cause)}"
