"""Where text comes from: a corpus by its name becomes files, and these documents, a piece at a time in memory."""

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from .arguments import DataArguments
from .documents import (
    ARCHIVES,
    JSON,
    KNOWN,
    TABLES,
    Content,
    Piece,
    first_line,
    is_hidden,
    is_shard,
    kind_of,
    read_file,
    read_tokens,
)

STDLIB = "python-stdlib"
# Left out of the standard library: tests, generated tables, what pip installed, and what differs between machines.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
OURS = ("prepared.json", "run.yaml")  # in a data_dir and in an out_dir, which are no text to train on
NOT_TEXT = {"dataset_infos.json"}  # what `hf download` leaves beside the files of a dataset
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LINE_END_BEFORE, LINE_END_BEHIND = re.compile(r"\A\r?\n"), re.compile(r"\r?\n\Z")


class Unreached(ValueError):
    """What a corpus is read from does not answer, or is not there."""


class Corpus:
    """The documents of some files, in their order.

    `fingerprint` changes if the documents may have; `revision` is a commit on the Hub, or None; `flags` name what else
    decides what the corpus holds. Once all is read, `sha256` is that of the documents, with a byte that UTF-8 never
    holds between them: for a single text, that of its file. `left_out` counts files of no known kind, by suffix.
    `spelled` counts how often the text spells a token that could end a document.
    """

    def __init__(self, arguments: DataArguments, paths: list, left_out: Counter[str], held_out: Iterable = ()):
        """The documents of `held_out` are for validation, and come last; without it, validation takes some of all."""
        self.name, self.column, self.left_out = str(arguments.corpus), arguments.text_column, left_out
        self.paths, self.held_out = [*paths, *held_out], set(held_out)
        tables = any(kind_of(str(path)) in {*JSON, *TABLES, *ARCHIVES} for path in paths)
        self.flags = [*(["text_column"] if tables else []), *([] if held_out else ["val_fraction"])]
        self.separator, self.spelled = arguments.document_separator, Counter[str]()
        self.flags += ["document_separator"] if self.separator else []
        self.vocab_size: int | None = None  # that token ids must be below

    @cached_property
    def revision(self) -> str | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)

    @cached_property
    def is_text(self) -> bool:
        """Whether there is text in it, not token ids."""
        content, *_ = next(self.read(), ("",))
        return isinstance(content, str)

    def read(self) -> Iterator[tuple[Content, bool, bool | None]]:
        """Pieces of documents: text or ids, whether the document ends, whether it is held out (None: not said)."""
        digest, between, left_out = hashlib.sha256(), b"", Counter[str]()
        for path in self.paths:
            pieces = self.read_path(path, left_out)
            for content, ends in split_documents(pieces, self.separator) if self.separator else pieces:
                if self.vocab_size and not isinstance(content, str) and content.max() >= self.vocab_size:
                    raise ValueError(
                        f"corpus: {path} has the id {content.max()}, but its tokenizer only {self.vocab_size} tokens: "
                        "--tokenizer names the one that it was made with"
                    )
                digest.update(between)
                digest.update(content.encode() if isinstance(content, str) else content.tobytes())
                between = b"\xff" if ends else b""
                yield content, ends, path in self.held_out if self.held_out else None
        self.sha256 = digest.hexdigest()
        self.left_out |= left_out

    def read_path(self, path: Any, left_out: Counter) -> Iterator[Piece]:
        return read_file(path, self.column, left_out)


class TokenCorpus(Corpus):
    """Files of token ids: nanoGPT's train.bin and val.bin, or the shards of llm.c and modded-nanogpt.

    nanoGPT's meta.pkl is not read, as a pickle runs what it holds: the tokenizer is named by flag.
    """

    def __init__(self, arguments: DataArguments, paths: list[Path]):
        held_out = sorted(path for path in paths if "val" in path.name)
        super().__init__(arguments, sorted(set(paths) - set(held_out)), Counter(), held_out)
        if not 0 < len(held_out) < len(paths):
            raise ValueError(f"corpus={self.name}: of its token files, some must have val in their name, and some not")

    @cached_property
    def is_text(self) -> bool:
        return False

    def read_path(self, path: Path, left_out: Counter) -> Iterator[Piece]:
        return read_tokens(path)


class HubCorpus(Corpus):
    """The files of a dataset on the Hub, fetched one after another as they are read, and kept by the Hub's client."""

    def __init__(self, arguments: DataArguments):
        self.arguments = arguments
        super().__init__(arguments, [], Counter(), [arguments.val_split] if arguments.val_split else [])
        self.flags += ["text_column", "corpus_config", "corpus_split", "val_split"]

    @cached_property
    def revision(self) -> str:
        from huggingface_hub import HfApi

        revision = self.arguments.corpus_revision or None
        return self.call(HfApi().dataset_info, self.name, revision=revision, timeout=10).sha

    @cached_property
    def fingerprint(self) -> str:
        asked = self.arguments
        identity = [self.name, asked.corpus_config, asked.corpus_split, self.column, self.revision]
        identity += [asked.val_split] if asked.val_split else []
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def read(self):
        self.call(self.find_files)
        return super().read()

    def find_files(self) -> None:
        """Ask the Hub which files the splits are in."""
        from datasets import load_dataset_builder

        asked = self.arguments
        files = load_dataset_builder(self.name, asked.corpus_config or None, revision=self.revision).config.data_files
        for split in filter(None, [asked.corpus_split, asked.val_split]):
            if split not in files:
                raise ValueError(f"it has no split {split!r}, but {', '.join(map(str, files))}")
        held_out = files[asked.val_split] if asked.val_split else []
        self.paths, self.held_out = [*files[asked.corpus_split], *held_out], set(held_out)

    def read_path(self, path: str, left_out: Counter):
        try:
            yield from read_file(self.call(fetch, path), self.column, left_out)
        except Unreached:
            raise
        except ValueError as mistake:
            raise ValueError(f"corpus={self.name}: {str(mistake).removeprefix('corpus: ')}") from None

    def call(self, function, *arguments, **named):
        """What a function of the Hub's libraries returns; what goes wrong there is one line."""
        try:
            return function(*arguments, **named)
        except Exception as error:  # of HTTP, of the Hub, of `datasets`
            raise Unreached(
                f"corpus={self.name}: no such file, folder or glob here, and as a Hub dataset it cannot be read "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None


def split_documents(pieces: Iterator[Piece], separator: str) -> Iterator[Piece]:
    """Pieces of documents that also end at each separator. A line end on either side of a separator is left out.

    A piece may be empty, if all that is left of its document is that it ends.
    """
    is_first, is_empty = False, True  # whether a separator stands before; whether the document has no text so far
    for content, ends in pieces:
        if not isinstance(content, str):
            raise ValueError(f"document_separator={separator[:40]}, but the corpus is tokens already: leave it out")
        *ended, last = content.split(separator)
        for part, part_ends, has_separator in [*((part, True, True) for part in ended), (last, ends, False)]:
            text = LINE_END_BEFORE.sub("", part) if is_first else part
            text = LINE_END_BEHIND.sub("", text) if has_separator else text
            if text or (part_ends and not is_empty):
                yield text, part_ends
            is_first = has_separator or (is_first and not part)
            is_empty = part_ends or (is_empty and not text)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def open_corpus(arguments: DataArguments) -> Corpus:
    """The corpus that the flags name; raises ValueError if there is none."""
    name, left_out = str(arguments.corpus), Counter[str]()
    try:
        if is_saved(Path(name)):
            return open_saved(arguments)
        if tokens := find_tokens(name):
            return TokenCorpus(arguments, tokens)
        if paths := find_files(name, left_out):
            corpus = Corpus(arguments, paths, left_out)
            if arguments.text_column != "text" and "text_column" not in corpus.flags:
                raise ValueError(f"text_column={arguments.text_column}, but there is no table in corpus={name}")
            return corpus
    except OSError as error:  # a name too long, a folder that may not be read
        raise ValueError(f"corpus={name[:99]} cannot be read: {error.strerror}") from None
    if HUB_ID.fullmatch(name) and kind_of(name) not in KNOWN:
        return HubCorpus(arguments)
    raise Unreached(f"corpus={name}: no such file, folder, glob or Hub dataset; {STDLIB} is always there")


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk of `datasets` has written a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(arguments: DataArguments) -> Corpus:
    """A dataset, or several splits of one, that save_to_disk has written."""

    def files_of(split: str) -> list[Path]:
        folder = Path(str(arguments.corpus))
        if not (folder / "state.json").is_file():
            folder = folder / split
            if not folder.is_dir():
                known = json.loads((folder.parent / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
                raise ValueError(f"corpus={arguments.corpus} has no split {split!r}, but {', '.join(known)}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]

    held_out = files_of(arguments.val_split) if arguments.val_split else []
    corpus = Corpus(arguments, files_of(arguments.corpus_split), Counter(), held_out)
    corpus.flags += ["corpus_split", "val_split"]
    return corpus


def find_tokens(name: str) -> list[Path]:
    """The files of token ids that a name stands for; none if it stands for something else."""
    path = Path(name)
    if all((path / file).is_file() for file in ("train.bin", "val.bin")):
        return [path / "train.bin", path / "val.bin"]
    found = path.glob("*.bin") if path.is_dir() else map(Path, glob.glob(name) if name.endswith(".bin") else ())
    return [file for file in found if file.is_file() and is_shard(file)]


def find_files(name: str, left_out: Counter) -> list[Path]:
    """The files of a corpus in the order of their paths; none if its name is not that of local files."""
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not STDLIB_SKIPPED & set(path.relative_to(root).parts)]
        paths = [path for path in paths if not path.name.startswith("_sysconfigdata")]
    elif is_address(name):
        paths = [download(name)]
    elif Path(name).is_file():
        paths = [Path(name)]
    elif Path(name).is_dir():
        paths = list(walk(Path(name), left_out))
        if not paths:
            raise Unreached(
                f"corpus={name}: the folder holds no {', '.join(sorted(KNOWN))} file; a glob such as {name}/**/*.html "
                "may do"
            )
    else:
        paths = [Path(path) for path in glob.glob(name, recursive=True) if Path(path).is_file()]
    return sorted(paths, key=lambda path: path.as_posix())


def walk(folder: Path, left_out: Counter) -> Iterator[Path]:
    """The files below a folder that are read: of known kinds, not hidden, and not written by this project."""
    been = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here, place = Path(parent), os.path.realpath(parent)
        if place in been or here != folder and any((here / mark).exists() for mark in OURS):  # a link may lead back
            folders.clear()
            continue
        been.add(place)
        folders[:] = [name for name in folders if not is_hidden(Path(name)) and not name.endswith(".partial")]
        for name in names:
            if (
                kind_of(name) in KNOWN
                and not is_hidden(Path(name))
                and name not in NOT_TEXT
                and (here / name).is_file()
            ):
                yield here / name
            elif not is_hidden(Path(name)):
                left_out[kind_of(name)] += 1


def is_address(name: str) -> bool:
    return name.startswith(("https://", "http://"))


def download(url: str) -> Path:
    """A file from the web, kept in the cache of `datasets` under a name that ends as the URL's does."""
    try:
        path = fetch(url)
    except Exception as error:  # of HTTP, of the file system
        raise Unreached(f"corpus={url} cannot be fetched: {type(error).__name__}: {first_line(error)}") from None
    suffixes = "".join(Path(url.split("?")[0]).suffixes[-2:])
    named = path.with_name(path.name + suffixes)
    if suffixes and not named.exists():
        named.symlink_to(path.name)
    return named if suffixes else path


def fetch(address: str) -> Path:
    from datasets import DownloadConfig, DownloadManager

    return Path(DownloadManager(download_config=DownloadConfig(disable_tqdm=True)).download(address))


def fingerprint_files(paths: list[Path]) -> str:
    """What changes with the path, the size or the time of a file."""
    stats = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
