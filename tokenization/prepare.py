"""A corpus and a tokenizer become a data_dir: token ids on disk, the tokenizer beside them, and a record of both.

    python -m tokenization.prepare --corpus=python-stdlib --tokenizer=bpe --vocab_size=4096 --data_dir=data/stdlib

The data_dir holds the splits `train` and `val` as `datasets` saves them (one column, `input_ids`), tokenizer.json,
tokenizer_config.json, and prepared.json: what it was made from, and how many tokens and bytes each split has.
"""
# ruff: noqa: E402 -- a command begins before it imports what takes a while

from __future__ import annotations

import dataclasses
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from command_start import begin_command

if __name__ == "__main__":
    begin_command("python -m tokenization.prepare")  # the imports below take a while

from .arguments import DataArguments, FlagParser, knob
from .provenance import RECORD, check_length, check_record, read_record

if TYPE_CHECKING:  # seconds of imports, which the command spares those who only look
    from transformers import PreTrainedTokenizerFast

    from .windows import TokenStream

CARD = """
# {name}

`{corpus}` as token ids, {train:,} for training and {val:,} for validation, in rows of 1,024 (column `input_ids`). The
rows are one stream: a document ends with the tokenizer's end-of-text token, not with a row. The tokenizer
({tokenizer}, {vocab_size:,} tokens) is beside them; [prepared.json](prepared.json) says what they were made from.

Train on it with `--corpus= --data_dir={name}`.
"""


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
        from .vocabularies import load_tokenizer

        return load_tokenizer(str(self.folder), "data_dir")

    def stream(self, split: str) -> TokenStream:
        """The tokens of `train` or `val`, on disk."""
        from .windows import open_stream

        return open_stream(self.folder, split, self.tokenizer.eos_token_id)


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
    made = not (data_dir / RECORD).exists()
    if made:
        check_place(data_dir, arguments)
        from .corpora import open_corpus
        from .making import make_data_dir

        make_data_dir(data_dir, open_corpus(arguments), arguments, minimum_tokens, model_tokenizer)
    prepared = PreparedData(data_dir, read_record(data_dir))
    if arguments.corpus is not None:  # another run may have made it meanwhile, from something else
        check_record(prepared.record, arguments)
    if model_tokenizer is not None and not made:
        from .vocabularies import check_tokens

        check_tokens(prepared.tokenizer, model_tokenizer, arguments.data_dir)
    check_length(prepared.record["tokens"], minimum_tokens)
    return prepared


def check_place(data_dir: Path, arguments: DataArguments) -> None:
    """Raise ValueError if a data_dir cannot be made."""
    if arguments.corpus is None:
        raise ValueError(f"data_dir={data_dir} is not prepared, and there is no --corpus to prepare it from")
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise ValueError(
            f"data_dir={data_dir} holds other files, and no prepared data: give an empty or new --data_dir"
        )
    if not data_dir.name:
        raise ValueError(f"data_dir={data_dir} cannot be made anew: give the name of a folder in it")


# ---------------------------------------------------------------------------------------------------------------------
# A data_dir on the Hub


def find_data_dir(name: str, corpus: str | None) -> Path:
    """The local folder of a data_dir: itself or, if there is neither that nor a corpus, its copy of the Hub's.

    Raises ValueError if it cannot be fetched.
    """
    if corpus is not None or Path(name).exists() or name.count("/") != 1:
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return Path(name)
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # of HTTP, of the Hub, of the disk
        raise ValueError(
            f"data_dir={name} is not prepared here, there is no --corpus to prepare it from, and from the Hub it "
            f"cannot be fetched: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from None


def push_data_dir(prepared: PreparedData, name: str) -> str:
    """Share a data_dir as a private dataset of this name, with its tokenizer and a card; returns its address."""
    from datasets import load_from_disk
    from huggingface_hub import HfApi, hf_hub_download

    record = prepared.record
    text = CARD.format(
        name=name, **record["tokens"], **{key: record[key] for key in ("corpus", "tokenizer", "vocab_size")}
    )
    try:
        address = load_from_disk(prepared.folder).push_to_hub(name, private=True).repo_url
        api, place = HfApi(), {"repo_id": address.repo_id, "repo_type": "dataset"}
        api.upload_folder(folder_path=prepared.folder, allow_patterns=["tokenizer*", RECORD], **place)
        card = Path(hf_hub_download(filename="README.md", **place)).read_text(encoding="utf-8")  # `datasets` wrote it
        heading = "---".join(card.split("---")[:2]) + "---\n"
        api.upload_file(path_or_fileobj=(heading + text).encode(), path_in_repo="README.md", **place)
    except Exception as error:
        first_line = (str(error).strip() or "it failed").splitlines()[0]
        raise ValueError(f"push_to_hub={name}: {type(error).__name__}: {first_line}") from None
    return str(address)


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
            print(push_data_dir(prepared, sharing.push_to_hub))
    except ValueError as mistake:
        parser.error(str(mistake))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; the same command goes on from there\n")


if __name__ == "__main__":
    main()
