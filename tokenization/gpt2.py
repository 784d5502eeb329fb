"""GPT-2's tokenizer, from the vocabulary that tiktoken fetches once and keeps."""

import sys

import tiktoken
import tiktoken.load
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from .documents import first_line
from .fast import END_OF_TEXT, fast_tokenizer


def make_gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's 50,257 tokens; raises ValueError if tiktoken can neither find nor fetch them."""
    try:
        encoding = get_encoding()
    except (OSError, ValueError) as error:  # OSError: of the network, or of a folder that may not be written
        raise ValueError(
            f"tokenizer=gpt2: GPT-2's vocabulary is not on this machine, and tiktoken cannot fetch it "
            f"({reason_of(error)}): run this once with a network; or set TIKTOKEN_CACHE_DIR to a folder that was "
            "filled on another machine; or take --tokenizer=bpe, which needs no download"
        ) from None
    converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[END_OF_TEXT])
    # there is no file to read them from
    converter.load_tiktoken_bpe = lambda tiktoken_url: encoding._mergeable_ranks  # type: ignore[method-assign]
    return fast_tokenizer(converter.converted())


def get_encoding() -> tiktoken.Encoding:
    """tiktoken's "gpt2"; a line on stderr comes before a download, because tiktoken downloads in silence."""
    read_file, announced = tiktoken.load.read_file, False

    def read_aloud(blobpath: str) -> bytes:
        nonlocal announced
        if not announced:
            print("fetching GPT-2's vocabulary (1.5 MB) ...", file=sys.stderr, flush=True)
        announced = True
        return read_file(blobpath)

    tiktoken.load.read_file = read_aloud  # tiktoken calls it only for what its cache lacks
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        tiktoken.load.read_file = read_file


def reason_of(error: Exception) -> str:
    """What went wrong, in one line: of a failed connection, the innermost cause alone."""
    cause = getattr(error.args[0] if error.args else None, "reason", error)
    return f"{type(error).__name__}: {first_line(cause)}"
