"""Corpora: each kind of file gives its documents to the last character, and what cannot be read is one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sysconfig
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenization import documents as documents_module
from tokenization.arguments import DataArguments
from tokenization.corpora import STDLIB, find_files, open_corpus
from tokenization.documents import last_cut, read_text

# What readers of tables like to take for something else than text.
TEXTS = ["007", "NA", "null", "", "2020-01-01", "a\r\nb\rc\n", "1e3", "true", " padded ", '"quoted", and', "\ufeffbom"]
TEXTS += ["\0", "caf\u00e9 \U0001f600", "\u2028\x85\x0b\x0c", "<|endoftext|>", "[1, 2]", "\n", "nan", "'", "1.50"]


def read(corpus, **flags):
    """The documents of a corpus, their pieces joined."""
    documents, held = [], ""
    for text, ends, _ in open_corpus(DataArguments(corpus=str(corpus), **flags)).read():
        assert text  # no piece is empty
        held += text
        if ends:
            documents.append(held)
            held = ""
    assert not held
    return documents


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_zip(content, name="inside.txt"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))


TABLES = {"jsonl": as_jsonl, "json": json.dumps, "csv": as_csv, "parquet": as_parquet}
SQUEEZE = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}

# ---------------------------------------------------------------------------------------------------------------------
# The standard library, text files, folders and globs


def test_the_standard_library_is_a_corpus_of_hundreds_of_documents():
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in find_files(STDLIB, Counter())]
    assert len(paths) > 300
    assert paths == sorted(set(paths), key=Path.as_posix)  # the same on every machine that has the same files
    assert {"argparse.py", "textwrap.py", "json/decoder.py"} <= {path.as_posix() for path in paths}
    for path in paths:
        assert not {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} & set(path.parts)
        assert path.suffix == ".py"


def test_every_document_of_the_standard_library_reads_as_its_file():
    texts = read(STDLIB)
    files = [path.read_bytes() for path in find_files(STDLIB, Counter())]
    files = [content for content in files if content]
    assert len(texts) == len(files)
    for text, content in zip(texts, files, strict=True):
        try:
            expected = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            continue  # a file that names another encoding; read in a test below
        assert text == expected


def test_a_python_file_may_name_its_encoding(tmp_path):
    path = write(tmp_path / "old.py", b"# -*- coding: latin-1 -*-\r\n# caf\xe9\r\n")
    assert read(path) == ["# -*- coding: latin-1 -*-\r\n# caf\u00e9\r\n"]


def test_a_folder_gives_the_files_that_it_knows_sorted_and_none_that_is_empty(tmp_path):
    for name, text in {"b.txt": "B", "sub/a.txt": "SA", "a.txt": "A", "empty.txt": "", "c.html": "C"}.items():
        write(tmp_path / name, text)
    write(tmp_path / "sub/b.txt.gz", gzip.compress(b"SB"))
    write(tmp_path / "t.jsonl", as_jsonl([{"text": "T1"}, {"text": "T2"}]))
    (tmp_path / "folder.txt").mkdir()
    assert read(tmp_path) == ["A", "B", "SA", "SB", "T1", "T2"]
    assert read(tmp_path / "*.txt") == ["A", "B"]
    assert read(tmp_path / "**/*.txt") == ["A", "B", "SA"]
    assert read(tmp_path / "*.html") == ["C"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    assert read(write(tmp_path / "chapter[1].txt", "one")) == ["one"]


def test_any_other_file_is_text_to_the_last_character(tmp_path):
    text = "\ufeffa\r\nb\rc\n\x0b\x0c\x1c\x85\u2028\u2029d\0e\t  \n\r\n"
    for name in ("text.txt", "text", "text.rst", "text.TXT"):
        assert read(write(tmp_path / name, text)) == [text]


# ---------------------------------------------------------------------------------------------------------------------
# Pieces

LETTERS = st.lists(st.sampled_from([*"a\u00e9\U0001f600! \n\t\x1c\x85", "  ", "\r\n"]), max_size=60).map("".join)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(LETTERS, st.integers(1, 20))
def test_pieces_are_the_text_cut_before_spaces_that_follow_something(monkeypatch, text, block):
    monkeypatch.setattr(documents_module, "BLOCK", block)
    pieces = list(read_text(io.BytesIO(text.encode())))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    for (before, _), (after, _) in zip(pieces, pieces[1:], strict=False):
        assert not before[-1].isspace() and after[0] in " \n"


def test_the_last_cut_is_the_last():
    assert last_cut("ab cd  e") == 5
    assert last_cut("ab cd") == 2
    assert last_cut("  ab") == last_cut("ab") == last_cut("") == last_cut(" ") == last_cut("\t ") == 0
    assert last_cut("a\t b") == 0  # the space follows white space


@pytest.mark.parametrize("at", [2**20 - 2, 2**20, 2**20 + 1, 2**20 + 16, 3 * 2**20])
def test_a_byte_that_is_no_text_is_found_where_it_is(tmp_path, at):
    text = ("\u00e9" * 7 + " ") * 2**18
    content = bytearray(text.encode()[:at])
    while content and content[-1] >= 0x80:  # up to the end of a character
        content.pop()
    place = len(content)
    path = write(tmp_path / "text.txt", bytes(content) + b"\xff and on " * 5)
    with pytest.raises(ValueError, match=rf"text\.txt is not UTF-8 text \(at byte {place}\)"):
        read(path)


@pytest.mark.parametrize("length", [5, 2**20 + 5])
def test_a_character_cut_off_at_the_end_is_found(tmp_path, length):
    path = write(tmp_path / "text.txt", b"a" * length + "\U0001f600".encode()[:3])
    with pytest.raises(ValueError, match=rf"not UTF-8 text \(at byte {length}\)"):
        read(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("kind", TABLES)
def test_a_row_of_a_table_is_a_document_to_the_last_character(tmp_path, kind):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    path = write(tmp_path / f"table.{kind}", TABLES[kind](rows))
    assert read(path) == [text for text in TEXTS if text]


@pytest.mark.parametrize("kind", TABLES)
def test_the_text_column_may_have_another_name(tmp_path, kind):
    path = write(tmp_path / f"table.{kind}", TABLES[kind]([{"text": "not this", "content": "this"}] * 2))
    assert read(path, text_column="content") == ["this", "this"]
    with pytest.raises(ValueError, match="has no column 'body'.*text, content.*--text_column"):
        read(path, text_column="body")


def test_null_is_no_document(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    for kind in ("jsonl", "json", "parquet"):
        assert read(write(tmp_path / f"table.{kind}", TABLES[kind](rows))) == ["a", "b"]


def test_json_may_be_one_row_or_lines(tmp_path):
    assert read(write(tmp_path / "one.json", '{"text": "a"}')) == ["a"]
    assert read(write(tmp_path / "lines.json", '{"text": "a"}\n\n{"text": "b"}')) == ["a", "b"]
    assert read(write(tmp_path / "bom.jsonl", '\ufeff{"text": "a"}\r\n')) == ["a"]


def test_a_long_csv_field_is_read_whole(tmp_path):
    assert read(write(tmp_path / "a.csv", as_csv([{"text": "x" * 300_000}]))) == ["x" * 300_000]


@pytest.mark.parametrize("kind", TABLES)
def test_datasets_would_have_changed_texts_or_agrees(tmp_path, kind, monkeypatch):
    # Why documents.py reads tables itself: where the library stops changing them, its readers could do.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": text} for text in ("007", "NA", "2020-01-01")]
    builder = {"jsonl": "json"}.get(kind, kind)
    changed = []
    for row in rows:
        path = write(tmp_path / f"{len(changed)}.{kind}", TABLES[kind]([row]))
        (loaded,) = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
        changed.append(loaded != row)
    assert any(changed) == (kind != "parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Compressed, and from the web


@pytest.mark.parametrize("squeeze", SQUEEZE)
@pytest.mark.parametrize("kind", ["txt", *TABLES])
def test_compressed_files_are_what_is_in_them(tmp_path, kind, squeeze):
    content = "a\r\nb" if kind == "txt" else TABLES[kind]([{"text": "a\r\nb"}])
    content = content.encode() if isinstance(content, str) else content
    path = write(tmp_path / f"file.{kind}.{squeeze}", SQUEEZE[squeeze](content))
    assert read(path) == ["a\r\nb"]


def test_a_zip_holds_several_files_of_any_kind(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("b.txt", "B")
        archive.writestr("a/", "")
        archive.writestr("a/c.jsonl", as_jsonl([{"text": "C"}, {"text": "D"}]))
    assert read(tmp_path / "all.zip") == ["C", "D", "B"]


def test_a_large_compressed_text_is_read_whole(tmp_path):
    text = "".join(f"{i} caf\u00e9\n" for i in range(300_000))
    assert read(write(tmp_path / "a.txt.xz", lzma.compress(text.encode(), preset=0))) == [text]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on loopback; the files of its folder, and nothing else."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            path = tmp_path / "site" / self.path.lstrip("/").split("?")[0]
            self.send_response(200 if path.is_file() else 404)
            content = path.read_bytes() if path.is_file() else b""
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hash(content)}"')
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_text_from_the_web_is_that_text(site):
    folder, address = site
    write(folder / "input.txt", "a\r\nb")
    write(folder / "rows.jsonl.gz", gzip.compress(as_jsonl([{"text": "T"}]).encode()))
    assert read(f"{address}/input.txt") == ["a\r\nb"]
    assert read(f"{address}/rows.jsonl.gz") == ["T"]
    write(folder / "input.txt", "changed")
    assert read(f"{address}/input.txt") == ["changed"]
    with pytest.raises(ValueError, match=r"^corpus=http.*missing\.txt cannot be fetched.*"):
        read(f"{address}/missing.txt")


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"", "there is no"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "is no JSON at line 2"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "has no column 'text' at line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "has int in column 'text' at line 2"),
        ("a.jsonl", b'{"text": ["a"]}\n', "has list in column 'text' at line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair in column 'text' at line 1"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"not UTF-8 text \(line 1\)"),
        ("a.jsonl", b"[" * 100_000, "cannot be read: RecursionError"),
        ("a.json", b'[{"text": "a"}, 5]', "has no column 'text' at row 2"),
        ("a.json", b"nothing", "is no JSON at line 1"),
        ("a.csv", b"id\n1\n", r"has no column 'text' at row 1 \(but id\)"),
        ("a.csv", b'text\n"never closed\n', "cannot be read: Error"),
        ("a.csv", b"text\ncaf\xe9\n", "is not UTF-8 text"),
        ("a.parquet", b"PAR1 and no more", "cannot be read: ArrowInvalid"),
        ("a.parquet", as_parquet([{"text": 5}]), "has int in column 'text' at row 1"),
        ("a.txt.gz", gzip.compress(b"text" * 999)[:-9], "cannot be read: EOFError"),
        ("a.txt.gz", b"no gzip", "cannot be read: BadGzipFile"),
        ("a.txt.xz", b"no xz", "cannot be read: LZMAError"),
        ("a.txt.bz2", b"no bzip2", "cannot be read: OSError"),
        ("a.zip", b"no zip", "cannot be read: BadZipFile"),
        ("a.zip", as_zip(b"\xff\xfe"), r"is not UTF-8 text \(at byte 0\)"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, said):
    from tokenization.making import find_cut

    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=said) as raised:
        find_cut(open_corpus(DataArguments(corpus=str(path))), 0.1)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_zstd_without_its_library_says_which(tmp_path):
    try:
        import zstandard
    except ImportError:
        path = write(tmp_path / "a.txt.zst", b"(\xb5/\xfd")
        with pytest.raises(ValueError, match="pip install zstandard"):
            read(path)
    else:
        path = write(tmp_path / "a.txt.zst", zstandard.ZstdCompressor().compress(b"a\r\nb"))
        assert read(path) == ["a\r\nb"]


def test_a_text_in_place_of_its_name_is_refused():
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        read("To be, or not to be, that is the question. " * 100)


@pytest.mark.parametrize("name", ["missing.txt", "missing/*.txt", "texts/missing.txt", "a/b/c", "", "~/x", "a b/c"])
def test_a_name_that_is_nothing_is_refused(name):
    with pytest.raises(ValueError, match="no such file, folder, glob or Hub dataset") as raised:
        read(name) if name else open_corpus(DataArguments(corpus="  "))
    assert STDLIB in str(raised.value)
