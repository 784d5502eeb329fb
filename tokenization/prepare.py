"""A corpus and a tokenizer become a data_dir: token ids on disk, the tokenizer beside them, and a record of both.

    python -m tokenization.prepare --corpus=python-stdlib --tokenizer=bpe --vocab_size=4096 --data_dir=data/stdlib

The data_dir holds the splits `train` and `val` as `datasets` saves them (one column, `input_ids`), tokenizer.json,
tokenizer_config.json, and prepared.json: what it was made from, and how many tokens and bytes each split has.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import DataArguments, FlagParser, knob
from .corpora import open_corpus
from .record import RECORD, check_length, check_record, read_record
from .sharing import find_data_dir, push_data_dir

if TYPE_CHECKING:  # seconds of imports, which the command spares those who only look
    from transformers import PreTrainedTokenizerFast

    from .windows import TokenStream


@dataclasses.dataclass
class SharingArguments:
    push_to_hub: str = knob("", "Hub id under which to share the data_dir, as a private dataset")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A data_dir that is there: its local folder, and what prepared.json in it says."""

    folder: Path
    record: dict

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the tokens. It loads when it is first asked for."""
        from .loading import load_tokenizer

        return load_tokenizer(str(self.folder), "data_dir")

    def stream(self, split: str) -> TokenStream:
        """The tokens of `train` or `val`, on disk."""
        from .windows import open_stream

        return open_stream(self.folder, split)


def prepare(
    arguments: DataArguments, minimum_tokens: int = 2, model_tokenizer: PreTrainedTokenizerFast | None = None
) -> PreparedData:
    """Make the data_dir unless it is there already.

    `model_tokenizer` is the tokenizer of a model that training goes on from: the data must have its tokens.

    The data_dir is written aside and renamed, so it is there whole or not at all. Raises ValueError if the corpus or
    the tokenizer cannot be read, if a split has fewer than minimum_tokens, and if data_dir holds something else.
    """
    if arguments.data_dir is None:
        raise ValueError("data_dir is not given: --data_dir=FOLDER names where the tokens are, or will be written")
    data_dir = find_data_dir(arguments.data_dir, arguments.corpus)
    corpus = None
    if not (data_dir / RECORD).exists():
        check_place(data_dir, arguments)
        from .making import make_data_dir

        corpus = open_corpus(arguments)
        make_data_dir(data_dir, corpus, arguments, minimum_tokens, model_tokenizer)
    prepared = PreparedData(data_dir, read_record(data_dir))
    if model_tokenizer is not None:
        from .loading import check_learned

        check_learned(prepared.tokenizer, model_tokenizer, arguments.data_dir)
    if arguments.corpus is not None:
        check_record(prepared.record, arguments, corpus or open_corpus(arguments))
    check_length(prepared.record["tokens"], minimum_tokens)
    return prepared


def check_place(data_dir: Path, arguments: DataArguments) -> None:
    """Raise ValueError where a data_dir cannot be made."""
    if arguments.corpus is None:
        raise ValueError(f"data_dir={data_dir} is not prepared, and there is no --corpus to prepare it from")
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise ValueError(
            f"data_dir={data_dir} holds other files, and no prepared data: give an empty or new --data_dir"
        )
    if not data_dir.name:
        raise ValueError(f"data_dir={data_dir} cannot be made anew: give the name of a folder in it")


def main() -> None:
    parser = FlagParser(
        [DataArguments, SharingArguments], prog="python -m tokenization.prepare", description=__doc__.split("\n")[0]
    )
    arguments, sharing = parser.parse(sys.argv[1:])
    try:
        prepared = prepare(arguments)
        record = prepared.record
        for split, tokens in record["tokens"].items():
            print(
                f"{split}: {record['documents'][split]:,} documents, {tokens:,} tokens, "
                f"{record['bytes'][split] / tokens:.2f} bytes a token, {record['unknowns'][split]:,} unknown"
            )
        print(f"{arguments.data_dir}: a vocabulary of {record['vocab_size']:,} tokens, from {record['corpus']}")
        if sharing.push_to_hub:
            print(push_data_dir(prepared.folder, sharing.push_to_hub))
    except ValueError as mistake:
        parser.error(str(mistake))


if __name__ == "__main__":
    main()
