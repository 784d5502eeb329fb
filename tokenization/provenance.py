"""prepared.json: what a data_dir was made from, and whether that is what the flags ask for."""

import json
import os
import sys
from pathlib import Path

from .arguments import DataArguments
from .corpora import Unreached, fingerprint_files, is_address, open_corpus

RECORD = "prepared.json"
KNOWN = {"sha256", "tokenizer", "vocab_size_asked", "tokens"}
# if the record has them
COMPARED = ("val_fraction", "text_column", "document_separator", "corpus_config", "corpus_split", "val_split")


def read_record(data_dir: Path) -> dict:
    """The contents of prepared.json; raises ValueError if it is not the record of a data_dir."""
    try:
        record = json.loads((data_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and record.keys() >= KNOWN:
        return record
    raise ValueError(f"data_dir={data_dir}: its {RECORD} is no record of prepared data: give another --data_dir")


def asked_for(arguments: DataArguments, corpus) -> dict:
    """What the flags ask for, as far as it decides what a data_dir holds: keys of the record."""
    asked = {"tokenizer": arguments.tokenizer, "tokenizer_fingerprint": fingerprint_of(arguments.tokenizer)}
    return (
        asked | {"vocab_size_asked": arguments.vocab_size} | {flag: getattr(arguments, flag) for flag in corpus.flags}
    )


def fingerprint_of(name: str) -> str | None:
    """What changes with the file or the folder of a tokenizer; None if its name is not theirs."""
    path = Path(name)
    if name in ("char", "bpe", "gpt2"):
        return None
    files = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):
        files = sorted(path.glob("*token*")) + sorted(path.glob("vocab*"))
    return fingerprint_files(files) if files else None


def check_record(record: dict, arguments: DataArguments) -> None:
    """Raise ValueError if a data_dir was made from other text, or in another way, than the flags say.

    A corpus that is not there any more, or is on the web, is taken to be what it was.
    """
    data_dir, name = str(arguments.data_dir), str(arguments.corpus)
    mend = f"give another --data_dir, or remove {data_dir}"
    if not same_tokenizer_as_recorded(record, arguments):
        raise ValueError(
            f"data_dir={data_dir} was made with tokenizer={record['tokenizer']}, not {arguments.tokenizer}: {mend}"
        )
    asked = {flag: getattr(arguments, flag) for flag in COMPARED}
    if arguments.tokenizer == "bpe":
        asked["vocab_size_asked"] = arguments.vocab_size
    record = {"document_separator": ""} | record  # it is not recorded if it is empty
    for key in asked:
        if record.get(key, asked[key]) != asked[key]:
            flag = key.removesuffix("_asked")
            raise ValueError(f"data_dir={data_dir} was made with {flag}={record[key]}, not {asked[key]}: {mend}")
    named_alike = record["corpus"] == name and arguments.corpus_revision in ("", record.get("revision"))
    if named_alike and is_address(name):
        return
    try:
        corpus = open_corpus(arguments)
        if record.get("fingerprint") == corpus.fingerprint:
            return
    except Unreached as mistake:
        if not named_alike:
            raise
        print(f"{mistake}; taking {data_dir} for what was made from it", file=sys.stderr)
        return
    made_from = record["corpus"]
    if corpus.revision:
        made_from = f"revision {record.get('revision')} of {made_from}"
    else:
        for _ in corpus.read():  # the files were touched or are others: their text decides
            pass
        if record["sha256"] == corpus.sha256:
            return
    raise ValueError(
        f"data_dir={data_dir} was made from other text ({made_from}) than corpus={name} holds now: {mend}"
    )


def same_tokenizer_as_recorded(record: dict, arguments: DataArguments) -> bool:
    name, fingerprint = arguments.tokenizer, fingerprint_of(arguments.tokenizer)
    if name == record["tokenizer"] and fingerprint in (None, record.get("tokenizer_fingerprint")):
        return True
    if name in ("char", "bpe"):
        return False
    from .vocabularies import (
        load_tokenizer,
        named_tokenizer,
        same_tokenizer,
    )  # seconds, which the usual case is spared

    return same_tokenizer(named_tokenizer(name), load_tokenizer(str(arguments.data_dir), "data_dir"))


def check_length(tokens: dict[str, int], minimum_tokens: int) -> None:
    """Raise ValueError if a split is shorter than a window."""
    for split, count in tokens.items():
        if count < minimum_tokens:
            raise ValueError(
                f"the {split} split has {count} tokens, but a window takes {minimum_tokens}: give a longer --corpus, "
                "or train with a smaller block_size"
            )
