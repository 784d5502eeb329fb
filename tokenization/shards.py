"""Token ids to disk while they are made: Arrow files that `datasets` loads, and a journal to resume from."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from .encoding import Encoded

ROW = 1024  # tokens in a stored row; a unit of storage, not a context: windows cross rows
ROWS = 4096  # rows that are held before they are written: 8 MiB of uint16, one record batch
SHARD = 2**26  # tokens after which a file ends and the journal is written: what a kill can cost, seconds of work
JOURNAL, LOCK = "journal.json", "lock"


class SplitWriter:
    """The ids of one split as rows of ROW ids in the column `input_ids`, file by file in a folder.

    Its state is the list of finished files, what is counted in them and, as `carry`, the ids that fill no row yet. A
    file that is not finished is written again by the run that goes on.
    """

    def __init__(self, folder: Path, id_type: str, state: dict | None = None):
        from datasets import Features, List, Value

        self.features = Features({"input_ids": List(Value(id_type), length=ROW)})
        self.folder, self.id_type = folder, np.dtype(id_type)
        self.state = state or {"files": [], "tokens": 0, "bytes": 0, "documents": 0, "unknowns": 0, "carry": []}
        self.held = [np.array(self.state["carry"], dtype=id_type)]  # less than a record batch
        self.file = self.stream = None
        folder.mkdir(exist_ok=True)

    def write(self, encoded: Encoded) -> None:
        self.held.append(encoded.ids)
        self.state["tokens"] += len(encoded.ids)
        for key in ("bytes", "documents", "unknowns"):
            self.state[key] += getattr(encoded, key)
        if sum(map(len, self.held)) >= ROWS * ROW:
            ids = np.concatenate(self.held)
            whole = len(ids) // (ROWS * ROW) * ROWS * ROW
            for start in range(0, whole, ROWS * ROW):
                self.write_rows(ids[start : start + ROWS * ROW])
            self.held = [ids[whole:]]

    def write_rows(self, ids: np.ndarray) -> None:
        """One record batch."""
        schema = self.features.arrow_schema
        if self.stream is None:
            name = f"data-{len(self.state['files']):05d}.arrow"
            self.file = pa.OSFile(str(self.folder / name), "wb")
            self.stream = pa.ipc.new_stream(self.file, schema)
            self.state["files"].append(name)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(ids), ROW).cast(schema.field("input_ids").type)
        self.stream.write_batch(pa.record_batch([rows], schema=schema))

    def finish_file(self, last: bool = False) -> dict:
        """Write all whole rows, and at last the carry, filled up with zeros; the next id begins a new file.

        Returns the state from which another writer goes on.
        """
        ids = np.concatenate(self.held)
        if last:
            ids = np.concatenate([ids, np.zeros(-len(ids) % ROW, dtype=self.id_type)])
        whole = len(ids) // ROW * ROW
        if whole:
            self.write_rows(ids[:whole])
        self.close()
        self.state["carry"] = ids[whole:].tolist()
        self.held = [ids[whole:]]
        return self.state

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.file.close()
            self.file = self.stream = None

    def finish(self, fingerprint: str) -> None:
        """The last file, and beside the files what `datasets` needs to load them."""
        from datasets import DatasetInfo

        self.finish_file(last=True)
        DatasetInfo(features=self.features).write_to_directory(self.folder)
        description = {
            "_data_files": [{"filename": name} for name in self.state["files"]],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.folder / "state.json").write_text(json.dumps(description, indent=2) + "\n")


def write_journal(folder: Path, journal: dict) -> None:
    """Write it aside and rename it, so that a kill leaves this one or the one before."""
    aside = folder / (JOURNAL + ".new")
    aside.write_text(json.dumps(journal))
    os.replace(aside, folder / JOURNAL)


def read_journal(folder: Path, made_from: dict) -> dict:
    """The journal of a run that made the same thing and was killed, else an empty one and an empty folder."""
    try:
        journal = json.loads((folder / JOURNAL).read_text())
    except (OSError, ValueError):
        journal = {}
    if journal.get("made_from") == made_from:
        return journal
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    return {}


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against other runs; waits for one that has it, and says so once."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{folder}: another run is at work there; waiting for it", file=sys.stderr, flush=True)
            with suppress(FileNotFoundError):  # it has finished, and renamed the folder
                lock.acquire()
        if lock.is_locked and (folder / LOCK).exists():
            break
        lock.release()
    try:
        yield
    finally:
        lock.release()
