"""From a file to its documents: plain text, .jsonl, .json, .csv or .parquet, as it is or compressed.

A document is read in pieces, so that one of any length fits in memory: (text, whether the document ends with it). The
libraries' own readers of these formats are passed over because they change text: they turn "007" into 7.0, "NA" into
nothing, "2020-01-01" into a date and "\\r\\n" into "\\n".
"""

import codecs
import csv
import hashlib
import io
import json
import lzma
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}  # fsspec's names
BLOCK = 2**20  # bytes of plain text read at a time

UNREADABLE = (
    *(OSError, EOFError, RecursionError, RuntimeError),  # RuntimeError: a .zip with a password
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, csv.Error, pa.ArrowException),
)

Piece = tuple[str, bool]


def kind_of(name: str) -> str:
    """The suffix that tells how to read a file, below that of its compression: .txt, .jsonl, ..."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def fingerprint_files(paths: list[Path]) -> str:
    """What changes with the path, the size or the time of a file."""
    stats = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def read_file(path: Path, column: str) -> Iterator[Piece]:
    """The documents of a file, none of them empty; raises ValueError where it cannot be read to the last character.

    `column` is where the text is in a table. Files that are no table are text in UTF-8, one document each.
    """
    try:
        for name, file in open_file(path):
            for text, ends in READERS.get(kind_of(name), read_text)(file, column):
                if text:
                    yield text, ends
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {path} is not UTF-8 text (at byte {error.start})") from None
    except UNREADABLE as error:
        raise ValueError(f"corpus: {path} cannot be read: {type(error).__name__}: {first_line(error)}") from None
    except ValueError as mistake:
        raise ValueError(f"corpus: {path} {mistake}") from None


def open_file(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """The file itself, or what is compressed in it: name and content. A .zip may hold several."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if not member.is_dir():
                    with archive.open(member) as file:
                        yield member.filename, file
        return
    try:
        opened = fsspec.open(str(path), compression=COMPRESSED.get(path.suffix.lower()))
    except ValueError:
        raise ValueError("is compressed with zstd: pip install zstandard, or unpack it") from None
    with opened as file:
        yield path.name, file


def read_text(file: BinaryIO, column: str) -> Iterator[Piece]:
    """Plain text to the last character, line ends and byte order mark as they are, in pieces of about BLOCK bytes.

    A piece ends where GPT-2's pattern ends a word whatever follows: before a space or line end that follows something
    else than white space. Its one look ahead asks whether white space goes on. Hence the pieces have the ids of the
    whole. A text without such a place is one piece.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, taken = [], 0
    while block := file.read(BLOCK):
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            error.start += taken - len(decoder.getstate()[0])
            raise
        taken += len(block)
        if len(block) == BLOCK and (cut := last_cut(text)):
            yield "".join((*held, text[:cut])), False
            held, text = [], text[cut:]
        held.append(text)
    try:
        held.append(decoder.decode(b"", final=True))
    except UnicodeDecodeError as error:
        error.start = taken - len(decoder.getstate()[0])
        raise
    yield "".join(held), True


def last_cut(text: str) -> int:
    """The last place where text may be cut, see read_text; 0 where there is none."""
    cut = len(text)
    while (cut := max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))) > 0:
        if not text[cut - 1].isspace():
            return cut
    return 0


def read_python(file: BinaryIO, column: str) -> Iterator[Piece]:
    """A Python file, which may name an encoding of its own in its first lines."""
    content = io.BytesIO(file.read())
    try:
        encoding, _ = tokenize.detect_encoding(content.readline)
        yield content.getvalue().decode(encoding), True
    except UnicodeDecodeError:
        raise
    except (SyntaxError, LookupError) as error:  # LookupError: an encoding that is none of text
        raise ValueError(f"cannot be read: {error}") from None


def read_jsonl(file: BinaryIO, column: str) -> Iterator[Piece]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield text_of(parse_json(line, f"line {number}"), column, f"line {number}"), True


def read_json(file: BinaryIO, column: str) -> Iterator[Piece]:
    """A list of rows, one row, or rows line by line, as many a file has it that is called .json."""
    content = file.read()
    try:
        rows = json.loads(content)
    except UnicodeDecodeError:
        raise
    except ValueError:
        yield from read_jsonl(io.BytesIO(content), column)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield text_of(row, column, f"row {number}"), True


def read_csv(file: BinaryIO, column: str) -> Iterator[Piece]:
    csv.field_size_limit(sys.maxsize)  # a document may be long
    rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    for number, row in enumerate(rows, start=1):
        yield text_of(row, column, f"row {number}"), True


def read_parquet(file: BinaryIO, column: str) -> Iterator[Piece]:
    table = pq.ParquetFile(file)
    check_column(table.schema_arrow.names, column, "the table")
    number = 0
    for batch in table.iter_batches(batch_size=100, columns=[column]):
        for row in batch.to_pylist():
            number += 1
            yield text_of(row, column, f"row {number}"), True


READERS = {
    ".py": read_python,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def parse_json(line: bytes, where: str):
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise ValueError(f"is not UTF-8 text ({where})") from None
    except ValueError as error:
        raise ValueError(f"is no JSON at {where}: {error}") from None


def text_of(row, column: str, where: str) -> str:
    """The text of a row, empty where it is null; raises ValueError where it is none."""
    check_column(row if isinstance(row, dict) else [], column, where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"has {type(text).__name__} in column {column!r} at {where}, where a text should be")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a surrogate pair in column {column!r} at {where}: it is no character") from None
    return text or ""


def check_column(columns, column: str, where: str) -> None:
    if column not in columns:
        known = ", ".join(map(str, columns)) or "none"
        raise ValueError(f"has no column {column!r} at {where} (but {known}): --text_column names it")


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries put below it."""
    return str(error).strip().split("\n")[0]
