"""A corpus and a tokenizer become a data_dir: token ids on disk, the tokenizer beside them, and a record of both.

    python -m tokenization.prepare --corpus=python-stdlib --tokenizer=bpe --vocab_size=4096 --data_dir=data/stdlib

The data_dir holds the splits `train` and `val` as `datasets` saves them (one column, `input_ids`), tokenizer.json,
tokenizer_config.json, and prepared.json: what it was made from, and how many tokens and bytes each split has.
"""

import hashlib
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .arguments import DataArguments, FlagParser
from .bpe import train_bpe_tokenizer
from .char import train_char_tokenizer
from .corpora import load_corpus, read_corpus
from .encoding import encode

RECORD = "prepared.json"


def prepare(arguments: DataArguments, minimum_tokens: int = 2, learned: PreTrainedTokenizerBase | None = None) -> dict:
    """Make the data_dir unless it is there already; returns its record, the contents of prepared.json.

    `learned` is the tokenizer of a model that will go on from there: the data must have its tokens.

    It is written aside and renamed, so it is there whole or not at all. Raises ValueError where the corpus or the
    tokenizer cannot be read, where a split has fewer than minimum_tokens, and where data_dir holds something else.
    """
    if arguments.data_dir is None:
        raise ValueError("data_dir is not given: --data_dir=FOLDER names where the tokens are, or will be written")
    data_dir = Path(arguments.data_dir)
    if (data_dir / RECORD).exists():
        record = read_record(data_dir)
        check_learned(load_tokenizer(arguments.data_dir, "data_dir"), learned, arguments.data_dir)
        if arguments.corpus is not None:
            check_record(record, arguments, list(read_corpus(arguments.corpus)))
    elif arguments.corpus is None:
        raise ValueError(f"data_dir={data_dir} is not prepared, and there is no --corpus to prepare it from")
    elif data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise ValueError(
            f"data_dir={data_dir} holds other files, and no prepared data: give an empty or new --data_dir"
        )
    elif not data_dir.name:
        raise ValueError(f"data_dir={data_dir} cannot be made anew: give the name of a folder in it")
    else:
        record = write_data_dir(data_dir, arguments, minimum_tokens, learned)
    check_length(record["tokens"], minimum_tokens)
    return record


def read_record(data_dir: Path) -> dict:
    """The contents of prepared.json; raises ValueError where it is not the record of a data_dir."""
    try:
        record = json.loads((data_dir / RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and {"sha256", "tokenizer", "vocab_size_asked", "tokens"} <= record.keys():
        return record
    raise ValueError(f"data_dir={data_dir}: its {RECORD} is no record of prepared data: give another --data_dir")


def write_data_dir(
    data_dir: Path, arguments: DataArguments, minimum_tokens: int, learned: PreTrainedTokenizerBase | None
) -> dict:
    """Read, tokenize and pack the corpus into a new data_dir; returns its record."""
    staging = data_dir.with_name(data_dir.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    new_parents = [parent for parent in staging.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
        documents = list(read_corpus(arguments.corpus))
        texts = load_corpus(documents)
        tokenizer = make_tokenizer(arguments, texts)
        check_learned(tokenizer, learned, arguments.data_dir)
        if len(documents) > 1 and tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer={arguments.tokenizer} has no end-of-text token, which separates documents")
        # A single text was cut by position: neither half is a document that ends. Each of several is.
        rows, tokens = {}, {}
        for split in texts:
            rows[split], tokens[split] = encode(texts[split], tokenizer, len(documents) > 1, f"tokenize {split}")
        check_length(tokens, minimum_tokens)
        record = {
            "corpus": arguments.corpus,
            "sha256": hash_documents(documents),
            "tokenizer": arguments.tokenizer,
            "vocab_size": len(tokenizer),
            "vocab_size_asked": arguments.vocab_size,
            "documents": {split: len(texts[split]) for split in texts},
            "bytes": {split: sum(len(text.encode()) for text in texts[split]["text"]) for split in texts},
            "tokens": tokens,
            "versions": {package: version(package) for package in ("datasets", "tokenizers", "transformers")},
        }
        DatasetDict(rows).save_to_disk(staging)
        tokenizer.save_pretrained(staging)
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if data_dir.exists():
            data_dir.rmdir()  # empty, as prepare has seen
        staging.rename(data_dir)
    except OSError as error:
        raise ValueError(f"data_dir={data_dir} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
    return record


def make_tokenizer(arguments: DataArguments, texts: DatasetDict) -> PreTrainedTokenizerBase:
    """The tokenizer that the flags name; raises ValueError where there is none."""
    if arguments.tokenizer == "char":  # of both splits, as in nanoGPT
        return train_char_tokenizer(text for split in texts.values() for text in split["text"])
    if arguments.tokenizer == "bpe":
        return train_bpe_tokenizer(texts["train"]["text"], arguments.vocab_size)
    return load_tokenizer(arguments.tokenizer)


def load_tokenizer(name: str, flag: str = "tokenizer", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder or Hub id that a flag names; raises ValueError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        allowed = "char, bpe, or a folder or Hub id with a tokenizer" if flag == "tokenizer" else "it has no tokenizer"
        raise ValueError(f"{flag}={name}: {allowed} ({reason})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{flag}={name} has no tokenizer.json, nor what one can be made from")
    return tokenizer


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn every text into the same ids."""
    backends = [first.backend_tokenizer, second.backend_tokenizer]
    for backend in backends:  # settings that encoding overrides, and leaves changed
        backend.no_padding()
        backend.no_truncation()
    return backends[0].to_str() == backends[1].to_str()


def hash_documents(documents: list[str]) -> str:
    """The sha256 of the documents, a byte that UTF-8 never holds between them: for one alone, that of its file."""
    digest = hashlib.sha256()
    for i, text in enumerate(documents):
        digest.update(b"\xff" * (i > 0) + text.encode())
    return digest.hexdigest()


def check_record(record: dict, arguments: DataArguments, documents: list[str]) -> None:
    """Raise ValueError where a data_dir was made from other text or another tokenizer than the flags name."""
    data_dir, mend = arguments.data_dir, f"give another --data_dir, or remove {arguments.data_dir}"
    if record["sha256"] != hash_documents(documents):
        raise ValueError(
            f"data_dir={data_dir} was made from other text ({record['corpus']}) than corpus={arguments.corpus} holds "
            f"now: {mend}"
        )
    if arguments.tokenizer in ("char", "bpe"):
        same = record["tokenizer"] == arguments.tokenizer
    else:
        same = same_tokenizer(load_tokenizer(arguments.tokenizer), load_tokenizer(data_dir, "data_dir"))
    if not same:
        raise ValueError(
            f"data_dir={data_dir} was made with tokenizer={record['tokenizer']}, not {arguments.tokenizer}: {mend}"
        )
    if arguments.tokenizer == "bpe" and record["vocab_size_asked"] != arguments.vocab_size:
        raise ValueError(
            f"data_dir={data_dir} was made with vocab_size={record['vocab_size_asked']}, not {arguments.vocab_size}: "
            f"{mend}"
        )


def check_learned(tokenizer: PreTrainedTokenizerBase, learned: PreTrainedTokenizerBase | None, data_dir: str) -> None:
    """Raise ValueError where a model learned other tokens than those of the data."""
    if learned is not None and not same_tokenizer(tokenizer, learned):
        raise ValueError(
            f"data_dir={data_dir} has other tokens than init_from={learned.name_or_path} learned: prepare another "
            f"data_dir with --tokenizer={learned.name_or_path}"
        )


def check_length(tokens: dict[str, int], minimum_tokens: int) -> None:
    for split, count in tokens.items():
        if count < minimum_tokens:
            raise ValueError(
                f"the {split} split has {count} tokens, but a window takes {minimum_tokens}: give a longer --corpus, "
                "or train with a smaller block_size"
            )


def main() -> None:
    parser = FlagParser([DataArguments], prog="python -m tokenization.prepare", description=__doc__.split("\n")[0])
    (arguments,) = parser.parse(sys.argv[1:])
    try:
        record = prepare(arguments)
    except ValueError as mistake:
        parser.error(str(mistake))
    for split, tokens in record["tokens"].items():
        print(
            f"{split}: {record['documents'][split]:,} documents, {tokens:,} tokens, "
            f"{record['bytes'][split] / tokens:.2f} bytes a token"
        )
    print(f"{arguments.data_dir}: a vocabulary of {record['vocab_size']:,} tokens, from {record['corpus']}")


if __name__ == "__main__":
    main()
