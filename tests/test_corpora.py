"""Corpora: each kind of file gives its documents to the last character, and what cannot be read is one line."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import sysconfig
import tarfile
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
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
    # Why documents.py reads some tables itself. Once the library no longer changes them, its readers will do.
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
# What a folder and an archive mean


def pack_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"top/{file.relative_to(folder)}")


def pack_tar(folder, path):
    with tarfile.open(path, "w:" + {"tgz": "gz", "tar": ""}.get(path.suffix[1:], path.suffix[1:])) as archive:
        archive.add(folder, "top")


@pytest.fixture
def mixed(tmp_path):
    """A folder with two documents of each known kind, and much that is no text to train on."""
    folder = tmp_path / "mixed"
    for name in ("a.txt", "b.md", "sub/c.rst"):
        write(folder / name, f"text of {name}")
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    for kind in ("jsonl", "jsonlines", "ndjson", "json", "csv", "parquet"):
        write(folder / f"rows.{kind}", TABLES.get(kind, as_jsonl)(rows))
    write(folder / "rows.tsv", as_csv(rows).replace(",", "\t"))
    for name in (".hidden.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "__MACOSX/a.txt", "cover.png", "sub/cover.png"):
        write(folder / name, b"\x89PNG\0 no text \xff")
    return folder


EXPECTED = sorted(["text of a.txt", "text of b.md", "text of sub/c.rst", *["one", "two"] * 7])


@pytest.mark.parametrize("name", ["", "all.zip", "all.tar", "all.tar.gz", "all.tgz", "all.tar.xz", "all.tar.bz2"])
def test_a_folder_and_an_archive_of_it_are_the_same_corpus(mixed, tmp_path, name):
    if name:
        (pack_zip if name == "all.zip" else pack_tar)(mixed, tmp_path / name)
    corpus = open_corpus(DataArguments(corpus=str(tmp_path / name if name else mixed)))
    assert sorted(text for text, *_ in corpus.read()) == EXPECTED
    assert corpus.left_out == {".png": 2}
    assert "text_column" in corpus.flags


def test_an_archive_in_a_folder_is_read(mixed, tmp_path):
    (tmp_path / "outer").mkdir()
    pack_zip(mixed, tmp_path / "outer" / "all.zip")
    write(tmp_path / "outer" / "more.txt", "more")
    assert sorted(read(tmp_path / "outer")) == sorted([*EXPECTED, "more"])


def test_what_this_project_has_written_is_no_corpus(tmp_path):
    write(tmp_path / "a.txt", "A")
    for mark in ("data/x/prepared.json", "out/x/run.yaml", "data/y.partial/made_from.json"):
        write(tmp_path / mark, "{}")
        write((tmp_path / mark).parent / "README.md", "about the data")
    assert read(tmp_path) == ["A"]


def test_links_are_followed_once(tmp_path):
    write(tmp_path / "folder" / "a.txt", "A")
    write(tmp_path / "elsewhere" / "b.txt", "B")
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "back").symlink_to(tmp_path / "folder")
    assert read(tmp_path / "folder") == ["A", "B"]


def test_a_mistake_in_an_archive_is_named_by_its_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("rows.jsonl", '{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"all\.zip \(rows\.jsonl\) has no column 'text' at line 2"):
        read(tmp_path / "all.zip")


def test_a_file_of_an_unknown_kind_must_be_text(tmp_path):
    assert read(write(tmp_path / "notes.html", "<p>a</p>")) == ["<p>a</p>"]
    with pytest.raises(ValueError, match=r"pages\.dat holds NUL characters, and its suffix is not one of \.arrow"):
        read(write(tmp_path / "pages.dat", "header\0\0and text"))


def test_a_column_is_refused_if_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="text_column=body, but there is no table in corpus="):
        read(write(tmp_path / "a.txt", "a"), text_column="body")


def test_a_message_quotes_little_of_a_table(tmp_path):
    path = write(tmp_path / "noheader.csv", as_csv([{f"word {'x' * 5000}": "a", **{f"c{i}": "b" for i in range(99)}}]))
    with pytest.raises(ValueError, match="has no column 'text'") as raised:
        read(path)
    assert len(str(raised.value)) < 500


def test_a_list_that_is_broken_off_is_found_at_its_line(tmp_path):
    lines = json.dumps([{"text": "a"}] * 100, indent=1).split("\n")
    lines[50] += " oops"
    with pytest.raises(ValueError, match="is no JSON at line 51"):
        read(write(tmp_path / "a.json", "\n".join(lines)))


def test_bytes_in_a_parquet_file_are_text(tmp_path):
    pq.write_table(pa.table({"text": ["a\u00e9".encode(), None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a\u00e9"]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert read(tmp_path / "none.parquet") == []


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that `datasets` has saved, and token ids


@pytest.fixture
def saved(tmp_path):
    """A DatasetDict of texts and of ids, with a validation split of its own."""
    splits = {"train": ["A", "", "B"], "validation": ["C"]}
    tables = {
        split: datasets.Dataset.from_dict({"text": texts, "input_ids": [[ord(t) for t in text] for text in texts]})
        for split, texts in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset_keeps_its_own_splits(saved):
    assert read(saved) == ["A", "B"]
    assert read(saved, corpus_split="validation") == ["C"]
    assert read(saved / "train") == ["A", "B"]
    corpus = open_corpus(DataArguments(corpus=str(saved), val_split="validation"))
    assert list(corpus.read()) == [("A", True, False), ("B", True, False), ("C", True, True)]
    assert corpus.flags == ["text_column", "corpus_split", "val_split"]
    with pytest.raises(ValueError, match="has no split 'test', but train, validation"):
        read(saved, val_split="test")


def test_a_column_of_ids_is_tokens(saved):
    corpus = open_corpus(DataArguments(corpus=str(saved), text_column="input_ids"))
    assert not corpus.is_text
    assert [ids.tolist() for ids, *_ in corpus.read()] == [[65], [66]]


def write_shard(path, ids, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, version, len(ids) if count is None else count
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(ids, dtype="<u2").tobytes())


def test_shards_of_llm_c_are_tokens(tmp_path):
    folder = tmp_path / "fineweb"
    write_shard(folder / "fineweb_val_000000.bin", [7, 8])
    write_shard(folder / "fineweb_train_000002.bin", [5, 6])
    write_shard(folder / "fineweb_train_000001.bin", [3, 4])
    for name in (folder, folder / "*.bin", folder / "fineweb_*_*.bin"):
        corpus = open_corpus(DataArguments(corpus=str(name)))
        assert not corpus.is_text and corpus.flags == []
        assert [(ids.tolist(), val) for ids, _, val in corpus.read()] == [
            ([3, 4], False),
            ([5, 6], False),
            ([7, 8], True),
        ]


@pytest.mark.parametrize(
    "shard, said",
    [
        ({"version": 2}, "is a shard of version 2"),
        ({"count": 3}, "version 1 with 3 tokens in 1028 bytes"),
        ({}, "val"),
    ],
    ids=str,
)
def test_shards_that_cannot_be_are_refused(tmp_path, shard, said):
    write_shard(tmp_path / "x" / "train_1.bin", [1, 2], **shard)
    if shard:
        write_shard(tmp_path / "x" / "val_1.bin", [1, 2])
    with pytest.raises(ValueError, match=said):
        list(open_corpus(DataArguments(corpus=str(tmp_path / "x"))).read())


@pytest.mark.parametrize("kind", ["uint32", "int64"])
def test_bins_of_wider_ids_are_refused(tmp_path, kind):
    for name in ("train.bin", "val.bin"):
        np.arange(1, 99, dtype=kind).tofile(tmp_path / name)
    with pytest.raises(ValueError, match="has a zero after each id, as files of uint32 have"):
        list(open_corpus(DataArguments(corpus=str(tmp_path))).read())


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
    ids=lambda value: value if isinstance(value, str) else "bytes",  # an archive holds the time of its making
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, said):
    from tokenization.making import find_cut

    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=said) as raised:
        find_cut(open_corpus(DataArguments(corpus=str(path))), 0.1)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.skipif(importlib.util.find_spec("zstandard") is not None, reason="zstandard is installed")
def test_a_zst_file_without_zstandard_names_the_extra(tmp_path):
    path = write(tmp_path / "a.txt.zst", b"(\xb5/\xfd")
    with pytest.raises(ValueError, match="pip install zstandard, or unpack it"):
        read(path)


def test_a_zst_file_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
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
