"""From a corpus to a data_dir: documents, splits, encoding, the record, reuse, and every mistake in one line."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from support import PATIENCE, ROOT
from support.data_dirs import files_of, joined_ids, prepare_flags, split_documents, stored_ids
from support.prepare_command import lines_of, run_command
from support.texts import END, FOXES, write_corpus, write_text
from tokenization.arguments import DataArguments
from tokenization.corpora import STDLIB, open_corpus
from tokenization.making import ROW
from tokenization.prepare import main
from tokenization.vocabularies import train_bpe_tokenizer
from tokenization.windows import open_stream


def make_word_level(size, eos="<eos>"):
    """A tokenizer of `size` tokens: the words w0, w1, ... and <eos>."""
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"<eos>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus of one text, char and bpe data_dirs made from it, and what is none of them; tests only read it."""
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_text(folder / "text.txt")
    write_text(folder / "copy.txt")
    write_text(folder / "other.txt", FOXES[:-1])
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.md").write_text("mine")
    prepare_flags(corpus=corpus, data_dir=folder / "char")
    prepare_flags(corpus=corpus, data_dir=folder / "bpe", tokenizer="bpe", vocab_size=300)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("length", [1, 9, ROW, 10 * ROW, 10 * ROW + 10, 40 * ROW + 3])
def test_only_the_last_row_is_filled_up(tmp_path, length):
    text = "ab" * length
    prepare_flags(1, corpus=write_text(tmp_path / "text.txt", text), data_dir=tmp_path / "data", val_fraction=0.5)
    assert stored_ids(tmp_path / "data", "train") + stored_ids(tmp_path / "data", "val") == [0, 1] * length


@pytest.mark.parametrize("size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_are_as_small_as_the_vocabulary_allows(tmp_path, size, dtype):
    make_word_level(size).save_pretrained(tmp_path / "words")
    largest = size - 2
    corpus = write_corpus(tmp_path / "corpus", [f"w0 w{largest} w7", "w1"])
    prepare_flags(corpus=corpus, data_dir=tmp_path / "data", tokenizer=tmp_path / "words")
    rows = datasets.load_from_disk(str(tmp_path / "data"))["train"]
    assert rows.features["input_ids"].feature.dtype == dtype
    assert rows["input_ids"][0][:4] == [0, largest, 7, size - 1]


def test_ids_beyond_16_bits_reach_the_stream(tmp_path):
    make_word_level(70_000).save_pretrained(tmp_path / "words")
    corpus = write_corpus(tmp_path / "corpus", ["w69998 w65536 w1", "w65535 w2"])
    prepare_flags(corpus=corpus, data_dir=tmp_path / "data", tokenizer=tmp_path / "words")
    saved = datasets.load_from_disk(str(tmp_path / "data"))
    assert {split: saved[split].features["input_ids"].feature.dtype for split in saved} == {
        "train": "uint32",
        "val": "uint32",
    }
    train = open_stream(str(tmp_path / "data"), "train")
    assert train.windows(np.array([0]), np.array([3]), 4).tolist() == [[69_998, 65_536, 1, 69_999, -100]]


# ---------------------------------------------------------------------------------------------------------------------
# The data_dir


def test_one_text_becomes_its_two_ends_without_an_end_of_text(prepared):
    for name in ("char", "bpe"):
        data_dir = prepared / name
        tokenizer = AutoTokenizer.from_pretrained(data_dir)
        train, val = (stored_ids(data_dir, split) for split in ("train", "val"))
        cut = int(len(FOXES) * 0.9)
        assert train == joined_ids(tokenizer, [FOXES[:cut]], end=False)
        assert val == joined_ids(tokenizer, [FOXES[cut:]], end=False)
        assert len(train) > ROW
        assert tokenizer.eos_token_id not in train + val  # though the text spells it in every line
        assert tokenizer.decode(train) + tokenizer.decode(val) == FOXES


@pytest.mark.parametrize("count", [2, 3, 10, 25])
def test_several_documents_each_end_with_end_of_text(tmp_path, count):
    documents = [f"{i} is {END}\r\n" * (i % 7 + 1) for i in range(count)]
    corpus = write_corpus(tmp_path / "corpus", documents, suffix=".md")
    record = prepare_flags(corpus=f"{corpus}/*.md", data_dir=tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    splits = split_documents(documents)
    for split in ("train", "val"):
        ids = stored_ids(tmp_path / "data", split)
        assert ids == joined_ids(tokenizer, splits[split], end=True)
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == len(splits[split]) == record["documents"][split] > 0


def test_a_stream_holds_what_datasets_reads(prepared):
    for split in ("train", "val"):
        ids = stored_ids(prepared / "bpe", split)
        column = datasets.load_from_disk(str(prepared / "bpe"))[split].features["input_ids"]
        assert column.feature.dtype == "uint16"
        stream = open_stream(str(prepared / "bpe"), split)
        count = len(ids)
        assert stream.windows(np.array([0]), np.array([count - 1]), count).tolist() == [[*ids, -100]]


def test_char_knows_the_characters_of_both_splits_and_bpe_learns_from_train_alone(tmp_path):
    text = "abc " * 90 + "xyz " * 10
    corpus = write_text(tmp_path / "text.txt", text)
    prepare_flags(corpus=corpus, data_dir=tmp_path / "char")
    assert max(stored_ids(tmp_path / "char", "val")) < len(set(text))  # nothing is spelled by bytes
    prepare_flags(corpus=corpus, data_dir=tmp_path / "bpe", tokenizer="bpe", vocab_size=300)
    learnt = train_bpe_tokenizer([text[: int(len(text) * 0.9)]], 300).backend_tokenizer.to_str()
    assert AutoTokenizer.from_pretrained(tmp_path / "bpe").backend_tokenizer.to_str() == learnt


def test_the_record_says_what_was_made_from_what(prepared):
    for name in ("char", "bpe"):
        record = json.loads((prepared / name / "prepared.json").read_text())
        assert record["corpus"] == str(prepared / "text.txt")
        assert record["sha256"] == hashlib.sha256((prepared / "text.txt").read_bytes()).hexdigest()
        assert record["tokenizer"] == name
        assert record["documents"] == {"train": 1, "val": 1}
        cut = int(len(FOXES) * 0.9)
        assert record["bytes"] == {"train": len(FOXES[:cut].encode()), "val": len(FOXES[cut:].encode())}
        assert record["tokens"] == {split: len(stored_ids(prepared / name, split)) for split in ("train", "val")}
        assert record["versions"] == {name: version(name) for name in ("datasets", "tokenizers", "transformers")}
    assert json.loads((prepared / "char" / "prepared.json").read_text())["vocab_size"] == len(set(FOXES)) + 257
    assert json.loads((prepared / "bpe" / "prepared.json").read_text())["vocab_size"] == 300


def test_bytes_are_those_of_utf8(tmp_path):
    documents = ["\u00e9" * 10, "\U0001f600" * 5, "ab"]  # the second is for validation
    record = prepare_flags(corpus=write_corpus(tmp_path / "corpus", documents), data_dir=tmp_path / "data")
    assert record["bytes"] == {"train": 22, "val": 20}
    assert record["tokens"] == {"train": 14, "val": 6}  # one for each character, and one for each document


def test_the_hash_tells_texts_orders_and_borders_apart(tmp_path):
    corpora = [["ab"], ["a", "b"], ["b", "a"], ["a\0b"], ["a", "b\n"], ["a", "b", "b"], ["a\0", "b"], ["a", "\0b"]]
    hashes = set()
    for i, documents in enumerate(corpora):
        corpus = open_corpus(DataArguments(corpus=write_corpus(tmp_path / str(i), documents)))
        assert len(list(corpus.read())) == len(documents)
        hashes.add(corpus.sha256)
    assert len(hashes) == len(corpora)


def test_a_data_dir_holds_only_what_the_record_explains(prepared):
    names = {path.name for path in (prepared / "char").iterdir()}
    assert names == {"train", "val", "dataset_dict.json", "tokenizer.json", "tokenizer_config.json", "prepared.json"}
    assert not list(prepared.glob("*.partial"))


def test_an_empty_data_dir_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    prepare_flags(corpus=write_text(tmp_path / "text.txt"), data_dir=tmp_path / "data")
    assert stored_ids(tmp_path / "data", "val")


def test_folders_above_the_data_dir_are_made(tmp_path):
    prepare_flags(corpus=write_text(tmp_path / "text.txt"), data_dir=tmp_path / "several" / "levels" / "data")
    assert stored_ids(tmp_path / "several" / "levels" / "data", "val")


# ---------------------------------------------------------------------------------------------------------------------
# Reuse


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"corpus": "text.txt"},
        {"corpus": "text.txt", "vocab_size": 999},  # char has no use for vocab_size
        {"corpus": "copy.txt"},  # the same text elsewhere
        {"corpus": "text.txt", "tokenizer": "char"},
        {"corpus": "text.txt", "data_dir": "bpe", "tokenizer": "bpe", "vocab_size": 300},
        {"corpus": "text.txt", "data_dir": "bpe", "tokenizer": "./bpe"},  # the data_dir's own, named as a folder
    ],
    ids=str,
)
def test_a_second_run_writes_nothing(prepared, monkeypatch, flags):
    monkeypatch.chdir(prepared)
    flags = {"data_dir": "char"} | flags
    before = files_of(flags["data_dir"])
    record = prepare_flags(**flags)
    assert files_of(flags["data_dir"]) == before
    assert record == json.loads((Path(flags["data_dir"]) / "prepared.json").read_text())


def test_the_tokenizer_of_another_data_dir_gives_its_ids(prepared, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["lazy dogs", "the quick brown fox", f"{END} \u20ac"])
    for _ in range(2):  # made, then reused
        record = prepare_flags(corpus=corpus, data_dir=tmp_path / "data", tokenizer=prepared / "bpe")
    assert record["vocab_size"] == 300
    tokenizer = AutoTokenizer.from_pretrained(prepared / "bpe")
    expected = joined_ids(tokenizer, ["lazy dogs", f"{END} \u20ac"], end=True)
    assert stored_ids(tmp_path / "data", "train") == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "data").get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_that_pads_and_truncates_is_made_to_do_neither(prepared, tmp_path):
    # Many a tokenizer.json tells how to pad and truncate; training text must not be, and the tokenizer stays the same.
    shutil.copytree(prepared / "bpe", tmp_path / "padding")
    file = tmp_path / "padding" / "tokenizer.json"
    settings = json.loads(file.read_text()) | {
        "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": END,
        },
    }
    file.write_text(json.dumps(settings))
    flags = {"corpus": prepared / "text.txt", "data_dir": tmp_path / "data", "tokenizer": tmp_path / "padding"}
    prepare_flags(**flags)
    assert stored_ids(tmp_path / "data", "train") == stored_ids(prepared / "bpe", "train")
    prepare_flags(**flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"corpus": "other.txt"}, r"data_dir=char was made from other text .*corpus=other\.txt"),
        ({"corpus": "text.txt", "tokenizer": "bpe"}, r"data_dir=char was made with tokenizer=char, not bpe"),
        ({"corpus": "text.txt", "tokenizer": "bpe", "data_dir": "bpe"}, r"made with vocab_size=300, not 4096"),
        ({"corpus": "text.txt", "data_dir": "bpe"}, r"made with tokenizer=bpe, not char"),
        ({"corpus": "text.txt", "tokenizer": "./bpe"}, r"data_dir=char was made with tokenizer=char, not \./bpe"),
        ({"corpus": "missing.txt"}, r"corpus=missing\.txt"),
        ({"minimum_tokens": 10**6}, r"the train split has [\d,]+ tokens, but a window takes 1000000.*--corpus"),
        (
            {"data_dir": "missing", "corpus": "text.txt", "minimum_tokens": 10**6},
            r"the train split has [\d,]+ tokens, but a window takes 1000000.*--corpus",
        ),
        ({"data_dir": "foreign", "corpus": "text.txt"}, r"data_dir=foreign holds other files"),
        ({"data_dir": "text.txt", "corpus": "text.txt"}, r"data_dir=text\.txt holds other files"),
        ({"data_dir": "foreign"}, r"data_dir=foreign is not prepared, and there is no --corpus"),
        ({"data_dir": "missing"}, r"data_dir=missing is not prepared, and there is no --corpus"),
    ],
    ids=str,
)
def test_a_data_dir_is_never_taken_for_another(prepared, monkeypatch, flags, said):
    monkeypatch.chdir(prepared)
    before = files_of(prepared)
    with pytest.raises(ValueError, match=said):
        prepare_flags(**({"data_dir": "char"} | flags))
    assert files_of(prepared) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "of another program"}'])
@pytest.mark.parametrize("corpus", [None, "text.txt"])
def test_a_foreign_record_is_refused_by_name(prepared, tmp_path, content, corpus):
    (tmp_path / "prepared.json").write_text(content)
    flags = {"corpus": prepared / corpus} if corpus else {}
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*prepared"):
        prepare_flags(data_dir=tmp_path, **flags)
    assert (tmp_path / "prepared.json").read_text() == content


# ---------------------------------------------------------------------------------------------------------------------
# After a failure


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("owner, at", [(PreTrainedTokenizerBase, "save_pretrained"), (datasets.Dataset, "map")])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, owner, at, failure):
    corpus = write_text(tmp_path / "text.txt")
    before = files_of(tmp_path)

    def fail(self, *args, **kwargs):
        assert (tmp_path / "data.partial" / "lock").exists()  # it is the middle
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(owner, at, fail)
        with pytest.raises((ValueError, KeyboardInterrupt)) as raised:
            prepare_flags(corpus=corpus, data_dir=tmp_path / "data")
    if isinstance(failure, OSError):
        assert f"data_dir={tmp_path / 'data'} cannot be written: No space left" in str(raised.value)
    assert files_of(tmp_path) == before
    prepare_flags(corpus=corpus, data_dir=tmp_path / "data")


def test_a_killed_run_leaves_no_data_dir_and_the_next_one_succeeds(tmp_path):
    long = write_text(tmp_path / "long.txt", FOXES * 400)  # seconds of work
    command = [sys.executable, "-m", "tokenization.prepare", f"--corpus={long}", f"--data_dir={tmp_path / 'data'}"]
    child = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "data.partial").exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        child.kill()
        _, stderr = child.communicate()
    assert child.returncode == -9, stderr.decode()
    assert (tmp_path / "data.partial").exists()  # it was killed at work, with no chance to clean up
    assert not (tmp_path / "data").exists()
    (tmp_path / "data.partial" / "train").mkdir(exist_ok=True)
    (tmp_path / "data.partial" / "train" / "data-00007-of-00009.arrow").write_text("left over")
    prepare_flags(corpus=write_text(tmp_path / "text.txt"), data_dir=tmp_path / "data")
    assert not (tmp_path / "data.partial").exists()
    assert not list((tmp_path / "data").rglob("data-00007*"))
    assert stored_ids(tmp_path / "data", "val")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_the_command_writes_the_same_ids_from_any_folder(prepared, tmp_path):
    # This process made the data_dir from an absolute path, in another folder, with another hash seed.
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(prepared / "text.txt", tmp_path / "text.txt")
    flags = ["--corpus=../text.txt", "--tokenizer=bpe", "--vocab_size=300", "--data_dir=../new/data"]
    child = run_command(*flags, cwd=tmp_path / "elsewhere")
    assert child.returncode == 0, child.stderr
    (line,) = lines_of(child.stderr)
    assert "its text spells <|endoftext|>" in line
    made, expected = tmp_path / "new" / "data", prepared / "bpe"
    for file in [*expected.glob("*/*.arrow"), expected / "tokenizer.json", expected / "tokenizer_config.json"]:
        assert (made / file.relative_to(expected)).read_bytes() == file.read_bytes(), file.name
    records = [json.loads((folder / "prepared.json").read_text()) for folder in (made, expected)]
    assert records[0].pop("corpus") == "../text.txt" and records[1].pop("corpus")
    assert records[0].pop("fingerprint") != records[1].pop("fingerprint")  # another path
    assert records[0] == records[1]
    train, val, whole = child.stdout.splitlines()
    assert train.startswith("train: ") and f" {records[0]['tokens']['train']:,} tokens" in train
    assert val.startswith("val: ") and f" {records[0]['tokens']['val']:,} tokens" in val
    assert "../new/data" in whole and " 300 tokens" in whole


def call_main(monkeypatch, *flags):
    """Runs the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_the_command_names_the_vocabulary_that_the_text_gave(tmp_path, monkeypatch, capsys):
    # A short text has fewer merges than were asked for.
    flags = [f"--corpus={write_text(tmp_path / 'text.txt')}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=bpe"]
    for _ in range(2):  # made, then reused
        assert call_main(monkeypatch, *flags, "--vocab_size=60000") == 0
        size = len(AutoTokenizer.from_pretrained(tmp_path / "data"))
        assert size < 60_000
        assert f"{size:,} tokens" in capsys.readouterr().out.splitlines()[-1]


def test_help_names_every_flag_and_touches_nothing(monkeypatch, capsys):
    assert call_main(monkeypatch, "--help") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for flag in ("--corpus", "--tokenizer", "--vocab_size", "--data_dir"):
        assert flag in shown.out


def write_wrong_inputs(folder):
    (folder / "empty.txt").write_text("")
    (folder / "no-texts").mkdir()
    (folder / "no-texts" / "page.html").write_text("words")
    write_corpus(folder / "all-empty", ["", "", ""])
    (folder / "latin.txt").write_bytes("words, caf\u00e9, words".encode("latin-1"))
    (folder / "latin.py").write_bytes("x = 'words, caf\u00e9, words'\n".encode("latin-1"))
    (folder / "codec.py").write_bytes(b"# coding: rot13\nx = 1\n")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 9)
    (folder / "short.txt").write_text("abc")
    write_corpus(folder / "short", ["", "long enough to train on", "a", ""])
    (folder / "empty-folder").mkdir()
    make_word_level(9, eos=None).save_pretrained(folder / "no-eos")
    ByT5Tokenizer().save_pretrained(folder / "no-json")
    (folder / "broken").mkdir()
    (folder / "broken" / "tokenizer.json").write_text("{")
    write_text(folder / "text.txt")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--corpus=missing.txt"], ["corpus=missing.txt", STDLIB]),
        (["--corpus=missing/*.txt"], ["corpus=missing/*.txt", STDLIB]),
        (["--corpus=empty.txt"], ["corpus=empty.txt", "no text"]),
        (["--corpus=no-texts"], ["corpus=no-texts", ".txt"]),
        (["--corpus=all-empty"], ["corpus=all-empty", "no text"]),
        (["--corpus=latin.txt"], ["corpus", "latin.txt", "not UTF-8", "byte 10"]),
        (["--corpus=latin.py"], ["corpus", "latin.py"]),
        (["--corpus=codec.py"], ["corpus", "codec.py"]),
        (["--corpus=binary.bin"], ["corpus", "binary.bin", "not UTF-8"]),
        (["--corpus=short.txt"], ["val split", "1 token", "--corpus"]),
        (["--corpus=short", "--tokenizer=./no-eos"], ["tokenizer=./no-eos", "end-of-text"]),
        (["--corpus=text.txt", "--tokenizer=./missing"], ["tokenizer=./missing"]),
        (["--corpus=text.txt", "--tokenizer=no/where"], ["tokenizer=no/where"]),
        (["--corpus=text.txt", "--tokenizer=empty-folder"], ["tokenizer=empty-folder"]),
        (["--corpus=text.txt", "--tokenizer=broken"], ["tokenizer=broken"]),
        (["--corpus=text.txt", "--tokenizer=no-json"], ["tokenizer=no-json"]),
        (["--corpus=text.txt", "--tokenizer="], ["tokenizer="]),
        (["--corpus=text.txt", "--data_dir=text.txt/data"], ["data_dir=text.txt/data"]),
        (["--corpus=text.txt", "--data_dir=text.txt"], ["data_dir=text.txt"]),
        (["--corpus=text.txt", "--vocab_size=many"], ["--vocab_size", "many"]),
        (["--corpus=text.txt", "--vocab_size=4.5"], ["--vocab_size", "4.5"]),
        (["--corpus=text.txt", "--tokenizer=bpe", "--vocab_size=256"], ["vocab_size=256", "257"]),
        (["--corpus=text.txt", "--tokenizer=bpe", "--vocab_size=-1"], ["vocab_size=-1", "257"]),
        (["--corpus=text.txt", "--vocabsize=300"], ["'vocabsize'", "'vocab_size'"]),
        (["--corpus=text.txt", "--data=d"], ["'data'", "'data_dir'"]),  # flags are not abbreviated
        (["--corpus=text.txt", "--corups=x"], ["'corups'", "'corpus'"]),
        (["--corpus=text.txt", "recipe.yaml"], ["'recipe.yaml'", "--key=value"]),
        (["--corpus=text.txt", "-v"], ["'-v'", "--key=value"]),
        (["--corpus"], ["--corpus"]),
        ([], ["data_dir=data", "--corpus"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_touches_nothing(tmp_path, monkeypatch, capsys, flags, said):
    write_wrong_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path)
    capsys.readouterr()
    assert call_main(monkeypatch, "--data_dir=data", *flags) == 2
    shown = capsys.readouterr()
    lines = lines_of(shown.err)
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("python -m tokenization.prepare: error: ")
    for part in said:
        assert part in lines[0]
    assert shown.out == ""
    assert files_of(tmp_path) == before


def test_without_a_data_dir_nothing_starts(monkeypatch, capsys):
    assert call_main(monkeypatch, f"--corpus={STDLIB}") == 2
    (line,) = lines_of(capsys.readouterr().err)
    assert "--data_dir=FOLDER" in line


def test_the_current_folder_is_refused_or_filled_but_never_a_riddle(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if call_main(monkeypatch, f"--corpus={prepared / 'text.txt'}", "--data_dir=.") == 0:
        assert stored_ids(tmp_path, "val")
    else:
        (line,) = lines_of(capsys.readouterr().err)
        assert "data_dir" in line


def test_a_mistake_is_one_line_in_a_process_of_its_own(tmp_path):
    # What libraries write on stderr while they are imported, or look for a tokenizer offline, counts as well.
    write_text(tmp_path / "text.txt")
    flags = ["--corpus=text.txt", "--data_dir=data", "--tokenizer=missing-folder"]
    child = run_command(*flags, cwd=tmp_path)
    assert child.returncode == 2
    assert child.stdout == ""
    (line,) = lines_of(child.stderr)
    assert line.startswith("python -m tokenization.prepare: error: tokenizer=missing-folder: ")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
