"""A byte-level BPE tokenizer, GPT-2's kind, trained on the corpus."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .fast import END_OF_TEXT, fast_tokenizer


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most vocab_size tokens: <|endoftext|>, 256 bytes, then merges by frequency.

    Text is cut into words by GPT-2's pattern first. Every string round-trips, because every byte is a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it leaves empty lines on stdout
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast_tokenizer(tokenizer)
