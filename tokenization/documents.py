"""From a file to its documents: plain text, JSON, a table or token ids, as it is, compressed or in an archive.

A document is read in pieces, so that one of any length fits in memory: (content, whether the document ends there).
The content is text, or an array of token ids. `datasets` reads csv, parquet and Arrow files. JSON is read line by
line: the JSON reader of `datasets` takes three times as long, turns a column of dates into timestamps, and does not
say in which line a mistake is.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = OPENERS.keys() | {".zst"}
ARCHIVES = {".zip", ".tar"}
PLAIN = {".txt", ".md", ".rst"}
JSON = {".json", ".jsonl", ".jsonlines", ".ndjson"}
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}  # the names `datasets` has for them
KNOWN = PLAIN | JSON | TABLES.keys() | ARCHIVES  # what is read of a folder or an archive
MAGIC, HEADER = (20240520).to_bytes(4, "little"), 1024  # bytes with which a shard of llm.c begins
BLOCK = 2**20  # bytes of text or ids that are read at a time

UNREADABLE = (
    *(OSError, EOFError, RecursionError, RuntimeError),  # RuntimeError: a .zip with a password
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, pa.ArrowException),
)

Content = str | np.ndarray
Piece = tuple[Content, bool]


def kind_of(name: str) -> str:
    """The suffix that tells how to read a file, below that of its compression: .txt, .jsonl, .tar ..."""
    path = PurePath(name.lower())
    if path.suffix == ".tgz":
        return ".tar"
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_hidden(path: PurePath) -> bool:
    """Whether a path, relative to its folder or archive, is one that people do not see."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def read_file(path: Path, column: str, left_out: Counter) -> Iterator[Piece]:
    """The documents of a file, none of them empty; raises ValueError if it cannot be read to the last character.

    `column` is where a table has its text. A file of any other kind is text in UTF-8, one document. `left_out` counts
    the members of archives that are of no known kind, by suffix.
    """
    where = str(path)
    try:
        for name, file in open_file(path, left_out):
            where = f"{path} ({name})" if name else str(path)
            for content, ends in read_content(kind_of(name or path.name), file, column, None if name else path):
                if len(content):
                    yield content, ends
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {where} is not UTF-8 text (at byte {error.start})") from None
    except UNREADABLE as error:
        raise ValueError(f"corpus: {where} cannot be read: {type(error).__name__}: {first_line(error)}") from None
    except ValueError as mistake:
        raise ValueError(f"corpus: {where} {mistake}") from None


def open_file(path: Path, left_out: Counter) -> Iterator[tuple[str, IO[bytes]]]:
    """The file itself, or the members of an archive: the name in the archive, and the content."""
    kind = kind_of(path.name)
    if kind not in ARCHIVES:
        with open(path, "rb") as packed, unpack(packed, path.name) as file:
            yield "", file
        return
    with open(path, "rb") as packed, unpack(packed, path.name) as archive:
        for name, member in open_zip(archive) if kind == ".zip" else open_tar(archive):
            if kind_of(name) in KNOWN - ARCHIVES and not is_hidden(PurePath(name)):
                yield name, unpack(member, name)
            elif not is_hidden(PurePath(name)):
                left_out[kind_of(name)] += 1


def open_zip(archive: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as members:
        for name in sorted(members.namelist()):
            if not name.endswith("/"):
                yield name, members.open(name)


def open_tar(archive: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=archive, mode="r:") as members:
        for member in members:
            if member.isfile():
                content = members.extractfile(member)
                assert content is not None  # it is only of what is no file
                yield member.name, content


def unpack(file: IO[bytes], name: str) -> IO[bytes]:
    """An open file of this name without its compression."""
    suffix = PurePath(name).suffix.lower()
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError("is compressed with zstd: pip install zstandard, or unpack it") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return OPENERS[suffix](file, "rb") if suffix in OPENERS else file


def read_content(kind: str, file: IO[bytes], column: str, path: Path | None) -> Iterator[Piece]:
    """The documents of an open file of this kind; `path` is None if the file is in an archive."""
    if kind in TABLES:
        return read_table(kind, file, column, path)
    if kind in JSON:
        rows = read_json(file) if kind == ".json" else read_lines(file)
        return ((text_of(row, column, where), True) for where, row in rows)
    if kind == ".py":
        return read_python(file)
    return read_text(file, any_suffix=kind not in PLAIN and bool(kind))


# ---------------------------------------------------------------------------------------------------------------------
# Text and token ids


def read_text(file: IO[bytes], any_suffix: bool = False) -> Iterator[Piece]:
    """Plain text to the last character, line ends and byte order mark as they are, in pieces of about BLOCK bytes.

    A piece ends where GPT-2's pattern ends a word whatever follows: before a space or line end that follows something
    else than white space. The pattern looks ahead for one thing, whether white space goes on. Hence the pieces have
    the ids of the whole. A text without such a place is one piece.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held: list[str] = []
    taken, block = 0, b" "
    while block:
        block = file.read(BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            error.start += taken - len(decoder.getstate()[0])
            raise
        if any_suffix and "\0" in text:
            raise ValueError(f"holds NUL characters, and its suffix is not one of {', '.join(sorted(KNOWN))}")
        taken += len(block)
        if len(block) == BLOCK and (cut := last_cut(text)):
            yield "".join((*held, text[:cut])), False
            held, text = [], text[cut:]
        held.append(text)
    yield "".join(held), True


def last_cut(text: str) -> int:
    """The last place where text may be cut, see read_text; 0 if there is none."""
    cut = len(text)
    while (cut := max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))) > 0:
        if not text[cut - 1].isspace():
            return cut
    return 0


def read_python(file: IO[bytes]) -> Iterator[Piece]:
    """A Python file, which may name an encoding of its own in its first lines."""
    content = io.BytesIO(file.read())
    try:
        encoding, _ = tokenize.detect_encoding(content.readline)
        yield content.getvalue().decode(encoding), True
    except (SyntaxError, LookupError) as error:  # LookupError: an encoding that is none of text
        raise ValueError(f"cannot be read: {error}") from None


def read_tokens(path: Path) -> Iterator[Piece]:
    """The ids of nanoGPT's train.bin or val.bin, or of a shard of llm.c; raises ValueError if they are not uint16."""
    size, head = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3)
    start = HEADER if is_shard(path) else 0
    if start and (head[1] != 1 or size != HEADER + 2 * int(head[2])):
        raise ValueError(
            f"corpus: {path} is a shard of version {head[1]} with {head[2]} tokens in {size} bytes; version 1 has "
            f"{HEADER} bytes and two for each token"
        )
    if size % 2:
        raise ValueError(f"corpus: {path} has {size} bytes, but a token takes 2: it is cut short")
    first = np.fromfile(path, dtype="<u2", count=2**16)
    if len(first) > 2 and not start and not first[1::2].any():
        raise ValueError(f"corpus: {path} has a zero after each id, as files of uint32 have: write ids as uint16")
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            yield np.frombuffer(block, dtype="<u2"), False


def is_shard(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read_lines(file: IO[bytes]) -> Iterator[tuple[str, object]]:
    """The values of JSON lines, and where each stands."""
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            try:
                yield f"line {number}", json.loads(line)
            except UnicodeDecodeError:
                raise ValueError(f"is not UTF-8 text (line {number})") from None
            except ValueError as error:
                raise ValueError(f"is no JSON at line {number}: {error}") from None


def read_json(file: IO[bytes]) -> Iterator[tuple[str, object]]:
    """A list of rows, one row, or rows line by line, as many a file has it that is called .json."""
    content = file.read()
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        try:
            json.loads(content.split(b"\n", 1)[0])
        except ValueError:
            raise ValueError(f"is no JSON at line {error.lineno}: {error}") from None
        yield from read_lines(io.BytesIO(content))
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"row {number}", row


def read_table(kind: str, file: IO[bytes], column: str, path: Path | None) -> Iterator[Piece]:
    """The texts, or lists of ids, in a column of a table. What is in an archive is read whole, without `datasets`."""
    import pandas
    from datasets import Features, Value, load_dataset

    table, options, separator = None, dict[str, Any](), "\t" if kind == ".tsv" else ","
    if TABLES[kind] == "csv":
        csv.field_size_limit(sys.maxsize)  # a document may be long
        # as text, whatever it looks like: "007", "NA" and "1.50" stay what they are
        options = {"sep": separator, "encoding": "utf-8-sig", "keep_default_na": False}
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        check_column(next(csv.reader(lines, delimiter=separator), []), column, "row 1")
        if path is None:
            file.seek(0)
            table = pa.table(pandas.read_csv(file, usecols=[column], dtype=str, **options))
        options["features"] = Features({column: Value("string")})
    if kind == ".parquet":
        parquet, options = (
            pq.ParquetFile(file if file.seekable() else io.BytesIO(file.read())),
            {"columns": [column]},
        )
        check_column(parquet.schema_arrow.names, column, "row 1")
        if path is None or path.suffix in COMPRESSED or not parquet.metadata.num_rows:  # which `datasets` cannot read
            table = parquet.read([column])
    if table is None:
        batches = load_dataset(TABLES[kind], data_files=str(path), split="train", streaming=True, **options)
        batches = batches.with_format("arrow").iter(batch_size=1000)
    else:
        batches = [table]
    number = 1
    try:
        for batch in batches:
            check_column(batch.column_names, column, "row 1")
            yield from contents_of(batch[column], column, number)
            number += len(batch)
    except pandas.errors.ParserError as error:
        raise ValueError(f"cannot be read: {first_line(error)}") from None


def contents_of(values: pa.ChunkedArray, column: str, first_row: int) -> Iterator[Piece]:
    """The texts, or arrays of ids, of a column, empty if null; raises ValueError if they are something else."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    ids = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ids = ids and pa.types.is_integer(kind.value_type)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)  # so Spark writes text
    for number, value in enumerate(values.to_pylist(), start=first_row):
        if ids:
            yield np.array(value or [], dtype=np.uint32), True
        else:
            value = value.decode() if is_bytes and value else value
            yield text_of({column: value}, column, f"row {number}"), True


def text_of(row, column: str, where: str) -> str:
    """The text of a row, empty if it is null; raises ValueError if it is something else."""
    check_column(row if isinstance(row, dict) else [], column, where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"has {type(text).__name__} in column {column!r} at {where}, but a text is expected")
    if text and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"has half a surrogate pair in column {column!r} at {where}: no character") from None
    return text or ""


def check_column(columns, column: str, where: str) -> None:
    if column not in columns:
        names = [str(name)[:40] for name in columns]
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
        raise ValueError(f"has no column {column!r} at {where} (but {known}): --text_column names it")


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries put below it."""
    return str(error).strip().split("\n")[0][:300]
