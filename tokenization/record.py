"""prepared.json: what a data_dir was made from, and whether that is what the flags ask for."""

import json
import sys
from pathlib import Path

from .arguments import DataArguments
from .corpora import HubUnreached
from .documents import fingerprint_files

RECORD = "prepared.json"
KNOWN = {"sha256", "tokenizer", "vocab_size_asked", "tokens"}


def read_record(data_dir: Path) -> dict:
    """The contents of prepared.json; raises ValueError where it is not the record of a data_dir."""
    try:
        record = json.loads((data_dir / RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and record.keys() >= KNOWN:
        return record
    raise ValueError(f"data_dir={data_dir}: its {RECORD} is no record of prepared data: give another --data_dir")


def asked_for(arguments: DataArguments, corpus) -> dict:
    """What the flags ask for, as far as it decides what a data_dir holds: keys of the record."""
    asked = {"tokenizer": arguments.tokenizer, "tokenizer_fingerprint": fingerprint_of(arguments.tokenizer)}
    if arguments.tokenizer == "bpe":
        asked["vocab_size_asked"] = arguments.vocab_size
    return asked | {flag: getattr(arguments, flag) for flag in corpus.flags}


def fingerprint_of(name: str) -> str | None:
    """What changes with the file or the folder of a tokenizer; None where its name is not theirs."""
    path = Path(name)
    if name in ("char", "bpe", "gpt2"):
        return None
    files = [path] if path.is_file() else sorted(path.glob("*token*")) + sorted(path.glob("vocab*"))
    return fingerprint_files(files) if files else None


def check_record(record: dict, arguments: DataArguments, corpus) -> None:
    """Raise ValueError where a data_dir was made from other text, or in another way, than the flags say."""
    data_dir, mend = arguments.data_dir, f"give another --data_dir, or remove {arguments.data_dir}"
    asked = asked_for(arguments, corpus)
    if not same_tokenizer_as_recorded(record, asked, data_dir):
        raise ValueError(
            f"data_dir={data_dir} was made with tokenizer={record['tokenizer']}, not {arguments.tokenizer}: {mend}"
        )
    for key in asked.keys() - {"tokenizer", "tokenizer_fingerprint"}:
        if record.get(key, asked[key]) != asked[key]:
            flag = {"vocab_size_asked": "vocab_size"}.get(key, key)
            raise ValueError(f"data_dir={data_dir} was made with {flag}={record[key]}, not {asked[key]}: {mend}")
    try:
        unchanged = record.get("fingerprint") == corpus.fingerprint
    except HubUnreached as mistake:
        if record["corpus"] != corpus.name or arguments.corpus_revision not in ("", record.get("revision")):
            raise
        print(f"{mistake}; taking it for what {data_dir} was made from", file=sys.stderr)
        return
    if unchanged:
        return
    if corpus.revision:
        made_from, same = f"revision {record.get('revision')} of {record['corpus']}", False
    else:
        for _ in corpus.read():  # the files were touched or are others: their text decides
            pass
        made_from, same = record["corpus"], record["sha256"] == corpus.sha256
    if not same:
        raise ValueError(
            f"data_dir={data_dir} was made from other text ({made_from}) than corpus={arguments.corpus} holds "
            f"now: {mend}"
        )


def same_tokenizer_as_recorded(record: dict, asked: dict, data_dir: str) -> bool:
    name = asked["tokenizer"]
    fingerprint = asked["tokenizer_fingerprint"]
    known = fingerprint or name in ("char", "bpe", "gpt2")
    if known and (name, fingerprint) == (record["tokenizer"], record.get("tokenizer_fingerprint")):
        return True
    if name in ("char", "bpe"):
        return False
    from .loading import load_tokenizer, named_tokenizer, same_tokenizer  # seconds, which the usual case is spared

    return same_tokenizer(named_tokenizer(name), load_tokenizer(data_dir, "data_dir"))


def check_length(tokens: dict[str, int], minimum_tokens: int) -> None:
    for split, count in tokens.items():
        if count < minimum_tokens:
            raise ValueError(
                f"the {split} split has {count} tokens, but a window takes {minimum_tokens}: give a longer --corpus, "
                "or train with a smaller block_size"
            )
