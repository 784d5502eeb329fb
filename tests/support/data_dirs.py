"""Making data_dirs, and what they should hold."""

import json
from pathlib import Path

import datasets

from tokenization.arguments import DataArguments
from tokenization.making import ROW, is_val
from tokenization.prepare import prepare


def prepare_flags(minimum_tokens=2, **flags):
    """The record of the data_dir that prepare makes with these flags. A path may be a Path."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return prepare(DataArguments(**flags), minimum_tokens).record


def stored_ids(data_dir, split):
    """The ids of a split, read through `datasets` alone. Each row but the last must have ROW ids."""
    count = json.loads((Path(data_dir) / "prepared.json").read_text())["tokens"][split]
    rows = datasets.load_from_disk(str(data_dir))[split]["input_ids"][:]
    assert [len(row) for row in rows] == [ROW] * (count // ROW) + [count % ROW] * (count % ROW > 0)
    return [i for row in rows for i in row]


def split_documents(documents):
    """The documents of each split, for a corpus of several documents."""
    return {
        split: [text for i, text in enumerate(documents) if is_val(i, 0.1) == (split == "val")]
        for split in ("train", "val")
    }


def joined_ids(tokenizer, documents, end):
    """What a split should hold: the ids of each document, one document at a time, and the end-of-text id if any."""
    ids = []
    for text in documents:
        ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        ids += [tokenizer.eos_token_id] * end
    return ids


def files_of(folder):
    """A value that changes if a file below the folder is written, added or removed."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.is_dir() or path.read_bytes(),
        )
        for path in sorted(Path(folder).rglob("*"))
    }
