"""A corpus and a tokenizer become a data_dir: token ids on disk, the tokenizer beside them, and a record of both.

    python -m tokenization.prepare --corpus=python-stdlib --tokenizer=bpe --vocab_size=4096 --data_dir=data/stdlib

The data_dir holds the splits `train` and `val` as `datasets` saves them (one column, `input_ids`), tokenizer.json,
tokenizer_config.json, and prepared.json: what it was made from, and how many tokens and bytes each split has.
"""

import dataclasses
import sys
from pathlib import Path

from .arguments import DataArguments, FlagParser, knob
from .corpora import open_corpus
from .record import RECORD, check_length, check_record, read_record
from .sharing import find_data_dir, push_data_dir


@dataclasses.dataclass
class SharingArguments:
    push_to_hub: str = knob("", "Hub id under which to share the data_dir, as a private dataset")


def prepare(arguments: DataArguments, minimum_tokens: int = 2, learned=None) -> dict:
    """Make the data_dir unless it is there already; returns its record, the contents of prepared.json.

    `learned` is the tokenizer of a model that will go on from there: the data must have its tokens.

    It is written aside and renamed, so it is there whole or not at all. Raises ValueError where the corpus or the
    tokenizer cannot be read, where a split has fewer than minimum_tokens, and where data_dir holds something else.
    """
    if arguments.data_dir is None:
        raise ValueError("data_dir is not given: --data_dir=FOLDER names where the tokens are, or will be written")
    data_dir = find_data_dir(arguments.data_dir, arguments.corpus)
    corpus = None
    if not (data_dir / RECORD).exists():
        check_place(data_dir, arguments)
        from .making import make_data_dir  # seconds of imports, which a data_dir that is there is spared

        corpus = open_corpus(arguments)
        make_data_dir(data_dir, corpus, arguments, minimum_tokens, learned)
    record = read_record(data_dir)
    if learned is not None:
        from .loading import check_learned, load_tokenizer

        check_learned(load_tokenizer(str(data_dir), "data_dir"), learned, arguments.data_dir)
    if arguments.corpus is not None:
        check_record(record, arguments, corpus or open_corpus(arguments))
    check_length(record["tokens"], minimum_tokens)
    return record


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
        record = prepare(arguments)
        for split, tokens in record["tokens"].items():
            print(
                f"{split}: {record['documents'][split]:,} documents, {tokens:,} tokens, "
                f"{record['bytes'][split] / tokens:.2f} bytes a token, {record['unknowns'][split]:,} unknown"
            )
        print(f"{arguments.data_dir}: a vocabulary of {record['vocab_size']:,} tokens, from {record['corpus']}")
        if sharing.push_to_hub:
            print(push_data_dir(find_data_dir(arguments.data_dir, arguments.corpus), sharing.push_to_hub))
    except ValueError as mistake:
        parser.error(str(mistake))


if __name__ == "__main__":
    main()
