"""The Hub as a source of text and as a place for data_dirs, on a Hub of the tests' own."""

import json
import os
import sys

import pytest

from support import ROOT
from support.data_dirs import joined_ids, prepare_flags, split_documents, stored_ids
from support.texts import FOXES, write_corpus, write_text
from tokenization.arguments import DataArguments
from tokenization.prepare import prepare

DOCUMENTS = [f"{i}\r\n{FOXES[i : 2 * i + 50]}" for i in range(60)]


def as_jsonl(documents):
    return "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(documents)).encode()


def run_python(hub, home, code, token="hf_alice", **environment):
    """Run code in a process that knows the tests' Hub alone; returns what it printed."""
    done = hub.run(home, [sys.executable, "-c", code], token, PYTHONPATH=str(ROOT), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
import json, sys
from tokenization import documents, making
from tokenization.arguments import DataArguments
from tokenization.prepare import prepare
flags = dict(corpus="bob/rows", text_column="body", data_dir="data", tokenizer="bpe", vocab_size=300)
"""


@pytest.fixture
def rows(hub):
    """A dataset of two files on the Hub."""
    files = {"train-0.jsonl": as_jsonl(DOCUMENTS[:35]), "train-1.jsonl": as_jsonl(DOCUMENTS[35:])}
    return hub.put("datasets", "bob/rows", files)


def test_a_dataset_of_the_hub_is_a_corpus(hub, rows, tmp_path):
    code = PREPARE + (
        "record = prepare(DataArguments(**flags)).record\n"
        "assert prepare(DataArguments(**flags)).record == record\n"  # a second run
        "print(record['revision'])\n"
        "wrong = dict(text_column='text', corpus_split='x', corpus_config='x', corpus='bob/x', corpus_revision='x')\n"
        "for key, value in wrong.items():\n"
        "    try:\n"
        "        prepare(DataArguments(**flags | {'data_dir': 'other', key: value}))\n"
        "    except ValueError as mistake:\n"
        "        print(mistake)\n"
    )
    revision, *refusals = run_python(hub, tmp_path, code).splitlines()
    assert revision == rows.find("main").sha
    assert len(refusals) == 5 and all("corpus=bob/" in line for line in refusals)
    assert "'text'" in refusals[0] and "id, body" in refusals[0] and "--text_column" in refusals[0]
    assert {path.name for path in tmp_path.iterdir()} & {"data", "other", "other.partial"} == {"data"}
    files = prepare_flags(
        corpus=write_corpus(tmp_path / "corpus", DOCUMENTS),
        data_dir=tmp_path / "files",
        tokenizer="bpe",
        vocab_size=300,
    )
    record = json.loads((tmp_path / "data" / "prepared.json").read_text())
    for key in ("documents", "bytes", "tokens", "vocab_size"):
        assert record[key] == files[key]
    for split in ("train", "val"):
        assert stored_ids(tmp_path / "data", split) == stored_ids(tmp_path / "files", split)

    # the dataset gets another commit: the data_dir was made from the one before
    hub.put("datasets", "bob/rows", {"train-2.jsonl": as_jsonl(["more"])})
    code = PREPARE + (
        "try:\n"
        "    prepare(DataArguments(**flags))\n"
        "except ValueError as mistake:\n"
        "    print(mistake)\n"
        "prepare(DataArguments(**flags, corpus_revision=sys.argv[1]))\n"
    )
    done = hub.run(tmp_path, [sys.executable, "-c", code, revision], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "was made from other text" in done.stdout and revision in done.stdout

    # if the Hub does not answer, the run takes what is there, and says so
    said = hub.run(
        tmp_path,
        [sys.executable, "-c", PREPARE + "prepare(DataArguments(**flags))"],
        PYTHONPATH=str(ROOT),
        HF_HUB_OFFLINE="1",
    )
    assert said.returncode == 0 and "corpus=bob/rows" in said.stderr and len(said.stderr.splitlines()) == 1, (
        said.stderr
    )


def test_a_run_on_a_dataset_of_the_hub_goes_on_where_the_connection_was_lost(hub, rows, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    prepare_flags(corpus=corpus, data_dir=tmp_path / "tokens", tokenizer="bpe", vocab_size=300)
    code = PREPARE + (
        "making.STRETCH, making.SHARD, making.PART = 300, 1100, 2\n"
        "flags['tokenizer'] = '../tokens'\n"
        "tokenized, encode = [], making.encode_texts\n"
        "making.encode_texts = lambda *table, **named: tokenized.append(table) or encode(*table, **named)\n"
        "try:\n"
        "    prepare(DataArguments(**flags))\n"
        "    print(json.dumps([len(tokenized), json.load(open('data/prepared.json'))]))\n"
        "except ValueError as mistake:\n"
        "    print(mistake)\n"
    )
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    steps, straight = json.loads(run_python(hub, tmp_path / "straight", code))
    hub.fail("GET .*train-1", 500, times=99)
    assert "corpus=bob/rows" in run_python(hub, tmp_path / "broken", code)
    done = len(list((tmp_path / "broken" / "data.partial").glob("tokens-*.arrow")))
    hub.faults.clear()
    steps_left, record = json.loads(run_python(hub, tmp_path / "broken", code))
    assert record == straight and done > 1 and steps_left < steps
    for split in ("train", "val"):
        folders = [tmp_path / name / "data" / split for name in ("straight", "broken")]
        straight_files, broken_files = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
        assert straight_files == broken_files and len(straight_files) >= 3
    expected = split_documents(DOCUMENTS)
    assert record["documents"] == {split: len(expected[split]) for split in expected}


def test_a_data_dir_is_shared_and_found_again(hub, tmp_path):
    write_text(tmp_path / "text.txt")
    command = [sys.executable, "-m", "tokenization.prepare", "--corpus=text.txt", "--data_dir=data"]
    for _ in range(2):  # pushed, then pushed again as it is
        done = hub.run(tmp_path, [*command, "--push_to_hub=alice/tokens"], PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("alice/tokens")
    shared = hub.dataset("alice/tokens")
    assert shared.private
    assert {"README.md", "prepared.json", "tokenizer.json", "tokenizer_config.json"} <= set(shared.files)
    assert [name.endswith(".parquet") for name in shared.files].count(True) == 2
    card = shared.files["README.md"].decode()
    assert "text.txt" in card and "--data_dir=alice/tokens" in card and "{" not in card
    code = """
import json, os
import numpy as np
from datasets import load_dataset
from tokenization.arguments import DataArguments
from tokenization.prepare import prepare
rows = load_dataset("alice/tokens")
found = prepare(DataArguments(corpus="", data_dir="alice/tokens"))
streams = {split: found.stream(split) for split in ("train", "val")}
ids = {s: x.windows(np.array([0]), np.array([len(x) - 1]), len(x) - 1)[0].tolist() for s, x in streams.items()}
for split in ids:
    assert [i for row in rows[split]["input_ids"] for i in row] == ids[split]
print(json.dumps(ids))
"""
    ids = json.loads(run_python(hub, tmp_path / "elsewhere", code))
    for split in ("train", "val"):
        assert ids[split] == stored_ids(tmp_path / "data", split)

    refused = hub.run(tmp_path, [*command, "--push_to_hub=bob/tokens"], PYTHONPATH=str(ROOT))
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "push_to_hub=bob/tokens" in line


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"data_dir": "nobody/nothing"}, r"data_dir=nobody/nothing is not prepared here.*--corpus.*from the Hub"),
        ({"corpus": "nobody/nothing", "data_dir": "data"}, "corpus=nobody/nothing: no such file.*as a Hub dataset"),
    ],
    ids=str,
)
def test_without_a_network_it_is_one_line(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as raised:
        prepare(DataArguments(**flags))
    assert "\n" not in str(raised.value) and os.listdir(tmp_path) == []


def test_what_the_tests_compare_with_is_plain_concatenation(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS[:12])
    prepare_flags(corpus=corpus, data_dir=tmp_path / "data")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    for split, texts in split_documents(DOCUMENTS[:12]).items():
        assert stored_ids(tmp_path / "data", split) == joined_ids(tokenizer, texts, end=True)
