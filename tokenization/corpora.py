"""Where text comes from: a corpus by its name becomes documents, streamed so that memory holds a piece at a time."""

import glob
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from copy import deepcopy
from functools import cached_property
from pathlib import Path

from .arguments import DataArguments
from .bins import BinCorpus, is_bins
from .documents import READERS, Piece, check_column, fingerprint_files, first_line, kind_of, read_file, text_of

STDLIB = "python-stdlib"
# Left out of the standard library: tests, generated tables, what pip installed, and what differs between machines.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
TABLES = READERS.keys() - {".py"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class FileCorpus:
    """Documents of local files, in their order. Its state is a count of pieces.

    `flags` name what else decides what it holds; `bytes` is how much text there is, None where that is not known
    before it is read; `fingerprint` changes with the path, size or time of a file; `revision` is None. Once all is
    read, `sha256` is that of the documents with a byte that UTF-8 never holds between them: for a single text, that of
    its file.
    """

    is_text, revision = True, None

    def __init__(self, name: str, paths: list[Path], column: str):
        self.name, self.paths, self.column = name, paths, column
        tables = any(kind_of(path.name) in TABLES for path in paths)
        self.flags = ("val_fraction", "text_column") if tables else ("val_fraction",)
        plain = not tables and all(kind_of(path.name) == path.suffix.lower() for path in paths)
        self.bytes = sum(path.stat().st_size for path in paths) if plain else None
        self.fingerprint = fingerprint_files(paths)

    def read(self, state: dict | None = None) -> Iterator[Piece]:
        """The pieces of its documents from a state on; those before it are read as well, for the hash."""
        skipped = state["pieces"] if state else 0
        self.pieces, self.digest, between = 0, hashlib.sha256(), b""
        for path in self.paths:
            for text, ends in read_file(path, self.column):
                self.digest.update(between + text.encode())
                between = b"\xff" * ends
                self.pieces += 1
                if self.pieces > skipped:
                    yield text, ends

    @property
    def state(self) -> dict:
        return {"pieces": self.pieces}

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()


class HubUnreached(ValueError):
    """The Hub does not answer, or knows no such dataset."""


class HubCorpus:
    """A split of a dataset on the Hub, a document a row, as `datasets` streams it. Its state is that of the stream.

    `revision` is the commit that it is read from. `sha256` is a chain: each row is hashed together with the hash of
    those before it, so that a run that goes on need not read them again.
    """

    is_text, bytes = True, None
    flags = ("val_fraction", "text_column", "corpus_config", "corpus_split")

    def __init__(self, arguments: DataArguments):
        self.name, self.config, self.split = arguments.corpus, arguments.corpus_config, arguments.corpus_split
        self.column, self.asked_revision = arguments.text_column, arguments.corpus_revision

    @cached_property
    def revision(self) -> str:
        from huggingface_hub import HfApi

        info = self.call(HfApi().dataset_info, self.name, revision=self.asked_revision or None, timeout=10)
        return info.sha

    @property
    def fingerprint(self) -> str:
        identity = [self.name, self.config, self.split, self.column, self.revision]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def read(self, state: dict | None = None) -> Iterator[Piece]:
        self.rows = self.call(self.open)
        self.sha256 = ""
        if state:
            self.rows.load_state_dict(state["rows"])
            self.sha256 = state["sha256"]
        rows = iter(self.rows)
        for number in range(1, 2**63):
            row = self.call(next, rows, None)
            if row is None:
                return
            try:
                text = text_of(row, self.column, f"row {number}")
            except ValueError as mistake:
                raise ValueError(f"corpus={self.name} {mistake}") from None
            if text:
                self.sha256 = hashlib.sha256(self.sha256.encode() + text.encode()).hexdigest()
                yield text, True

    def open(self):
        from datasets import load_dataset

        config = self.config or None
        rows = load_dataset(self.name, config, split=self.split, revision=self.revision, streaming=True)
        if rows.column_names:
            check_column(rows.column_names, self.column, "its table")
            rows = rows.select_columns([self.column])
        return rows

    @property
    def state(self) -> dict:
        return {"rows": deepcopy(self.rows.state_dict()), "sha256": self.sha256}

    def call(self, function, *arguments, **named):
        """What a function of the Hub's libraries returns; what goes wrong there is one line."""
        try:
            return function(*arguments, **named)
        except Exception as error:  # of HTTP, of the Hub, of `datasets`, of a format
            raise HubUnreached(
                f"corpus={self.name}: no such file, folder or glob here, and as a Hub dataset it cannot be read "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None


def open_corpus(arguments: DataArguments) -> FileCorpus | HubCorpus | BinCorpus:
    """The corpus that the flags name; raises ValueError where there is none."""
    name = arguments.corpus
    try:
        if is_bins(name):
            return BinCorpus(name)
        paths = find_files(name)
        if paths:
            return FileCorpus(name, paths, arguments.text_column)
    except OSError as error:  # a name too long, a folder that may not be read
        raise ValueError(f"corpus={name} cannot be read: {error.strerror}") from None
    if HUB_ID.fullmatch(name) and kind_of(name) not in {".txt", *READERS}:
        return HubCorpus(arguments)
    raise ValueError(f"corpus={name}: no such file, folder, glob or Hub dataset; {STDLIB} is always there")


def find_files(name: str) -> list[Path]:
    """The files of a corpus in the order of their paths; none where its name is not that of local files."""
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not STDLIB_SKIPPED & set(path.relative_to(root).parts)]
        paths = [path for path in paths if not path.name.startswith("_sysconfigdata")]
    elif name.startswith(("https://", "http://")):
        paths = [download(name)]
    elif Path(name).is_file():
        paths = [Path(name)]
    elif Path(name).is_dir():
        known = {".txt", *TABLES}
        paths = [path for path in Path(name).rglob("*") if path.is_file() and kind_of(path.name) in known]
        if not paths:
            raise ValueError(
                f"corpus={name}: the folder holds no {', '.join(sorted(known))} file; a glob such as {name}/**/*.md "
                "may do"
            )
    else:
        paths = [Path(path) for path in glob.glob(name, recursive=True) if Path(path).is_file()]
    return sorted(paths, key=lambda path: path.as_posix())


def download(url: str) -> Path:
    """A file from the web, kept in the cache of `datasets` under a name that ends as the URL's does."""
    from datasets import DownloadConfig, DownloadManager

    try:
        path = Path(DownloadManager(download_config=DownloadConfig(disable_tqdm=True)).download(url))
    except Exception as error:  # of HTTP, of the file system
        raise ValueError(f"corpus={url} cannot be fetched: {type(error).__name__}: {first_line(error)}") from None
    suffixes = "".join(Path(url.split("?")[0]).suffixes[-2:])
    named = path.with_name(path.name + suffixes)
    if suffixes and not named.exists():
        named.symlink_to(path.name)
    return named if suffixes else path
