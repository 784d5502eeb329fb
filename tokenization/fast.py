"""A tokenizer of the `tokenizers` library as the fast tokenizer that AutoTokenizer loads with no code of ours."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap it, with <|endoftext|> as its one special token; what it decodes is left as it is."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # a batch of prompts is continued on its right
        clean_up_tokenization_spaces=False,
    )
