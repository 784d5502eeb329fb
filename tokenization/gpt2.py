"""GPT-2's tokenizer, from the vocabulary that tiktoken fetches and keeps."""

import tiktoken
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from .documents import first_line
from .fast import END_OF_TEXT, fast_tokenizer


def make_gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's 50,257 tokens; raises ValueError where tiktoken can neither find nor fetch them."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer=gpt2: tiktoken cannot fetch its vocabulary ({first_line(error)}): go online once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[END_OF_TEXT])
    converter.load_tiktoken_bpe = lambda vocab_file: encoding._mergeable_ranks  # there is no file to read them from
    return fast_tokenizer(converter.converted())
