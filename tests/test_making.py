"""Making a data_dir: nanoGPT's own ids, the same for any number of processes, and nothing stops it for good."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiktoken
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from support import PATIENCE, ROOT
from support.data_dirs import files_of, prepare_flags, stored_ids
from support.models import make_model
from support.needs import needs_gpt2, needs_shakespeare
from support.prepare_command import Command, lines_of, run_command
from support.texts import FOXES, write_corpus, write_text
from tokenization.arguments import DataArguments
from tokenization.corpora import open_corpus
from tokenization.making import ROW
from tokenization.prepare import prepare


def finished(staging):
    """The files of tokens that a run has finished there, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in staging.glob("tokens-*.arrow")}


def contents(folder):
    """The bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def command(tmp_path_factory):
    """Starts the prepare command, by default with small files; see support/prepare_command.py."""
    started = []

    def start(*flags, small=0.0, **settings):
        started.append(Command(tmp_path_factory.mktemp("said"), *flags, small=small, **settings))
        return started[-1]

    yield start
    for each in started:
        if each.process.is_alive():  # a test that failed has left it
            each.process.kill()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """One long text, and many documents, of a megabyte each."""
    folder = tmp_path_factory.mktemp("corpora")
    write_text(folder / "long.txt", "".join(f"{i} {FOXES[i % 900 : i % 1100 + 200]}\n" for i in range(3500)))
    rows = [{"text": f"{i}\r\n" + FOXES[i % 999 : i % 1500 + 99]} for i in range(4000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Tiny Shakespeare, as nanoGPT's own prepare.py files have it


@needs_shakespeare
@needs_gpt2
def test_tiny_shakespeare_in_gpt2s_tokens_is_nanogpts(tmp_path):
    record = prepare_flags(corpus=os.environ["TINYSHAKESPEARE"], data_dir=tmp_path / "data", tokenizer="gpt2")
    assert record["tokens"] == {"train": 301_966, "val": 36_059}
    data = Path(os.environ["TINYSHAKESPEARE"]).read_text(encoding="utf-8")
    encoding = tiktoken.get_encoding("gpt2")
    cut = int(len(data) * 0.9)
    for split, text in {"train": data[:cut], "val": data[cut:]}.items():
        assert stored_ids(tmp_path / "data", split) == encoding.encode_ordinary(text)


@needs_shakespeare
def test_tiny_shakespeare_in_characters_is_nanogpts(tmp_path):
    record = prepare_flags(corpus=os.environ["TINYSHAKESPEARE"], data_dir=tmp_path / "data")
    assert record["tokens"] == {"train": 1_003_854, "val": 111_540} and record["vocab_size"] == 65 + 256 + 1
    data = Path(os.environ["TINYSHAKESPEARE"]).read_text(encoding="utf-8")
    stoi = {character: i for i, character in enumerate(sorted(set(data)))}
    ids = [stoi[character] for character in data]
    assert stored_ids(tmp_path / "data", "train") + stored_ids(tmp_path / "data", "val") == ids


# ---------------------------------------------------------------------------------------------------------------------
# The same whoever makes it


@pytest.mark.parametrize("corpus", ["long.txt", "rows.jsonl"])
def test_the_result_does_not_depend_on_num_proc_or_on_what_is_done_at_a_time(corpora, tmp_path, command, corpus):
    flags = [f"--corpus={corpora / corpus}", "--tokenizer=bpe", "--vocab_size=300"]
    for num_proc in (1, 3):
        child = command(*flags, f"--data_dir={tmp_path / str(num_proc)}", f"--num_proc={num_proc}").result()
        assert child.returncode == 0, child.stderr
    one, three = (contents(tmp_path / name) for name in ("1", "3"))
    assert one == three
    assert len([name for name in one if name.endswith(".arrow")]) > 6
    flags = {"corpus": corpora / corpus, "tokenizer": "bpe", "vocab_size": 300}
    record = prepare_flags(data_dir=tmp_path / "whole", **flags)
    assert record == json.loads(one["prepared.json"])
    for split in ("train", "val"):
        assert stored_ids(tmp_path / "whole", split) == stored_ids(tmp_path / "1", split)


def test_a_process_may_have_no_document_of_a_split(tmp_path):
    # of three documents, each its own process's, the second is for validation
    write_corpus(tmp_path / "files", ["abc" * 500, "bca", "cab" * 500])
    flags = {"corpus": tmp_path / "files", "data_dir": tmp_path / "data"}
    record = prepare_flags(num_proc=3, **flags)
    assert record["documents"] == {"train": 2, "val": 1} and record["tokens"] == {"train": 3002, "val": 4}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    end = tokenizer.eos_token
    assert tokenizer.decode(stored_ids(tmp_path / "data", "train")) == "abc" * 500 + end + "cab" * 500 + end


def test_files_hold_whole_rows_and_no_row_is_lost_between_them(corpora, tmp_path, command):
    child = command(f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}").result()
    assert child.returncode == 0, child.stderr
    text = (corpora / "long.txt").read_bytes().decode()
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = stored_ids(tmp_path / "data", "train") + stored_ids(tmp_path / "data", "val")
    assert ids == [stoi[character] for character in text]
    assert len(list((tmp_path / "data" / "train").glob("*.arrow"))) > 6
    rows = datasets.load_dataset(
        "arrow", data_files=str(tmp_path / "data/train/*.arrow"), split="train", streaming=True
    )
    assert next(iter(rows))["input_ids"] == ids[:ROW]  # each file says what is in it


def test_a_long_text_is_written_in_several_record_batches(tmp_path):
    text = "ab" * (3000 * ROW // 2)
    prepare_flags(corpus=write_text(tmp_path / "text.txt", text), data_dir=tmp_path / "data", val_fraction=0.01)
    column = datasets.load_from_disk(str(tmp_path / "data" / "train")).data.column("input_ids")
    assert column.num_chunks > 1
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    np.testing.assert_array_equal(ids, np.tile([0, 1], len(text))[: int(len(text) * 0.99)])


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.parametrize("corpus, flags", [("long.txt", []), ("rows.jsonl", ["--tokenizer=bpe", "--vocab_size=300"])])
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(corpora, tmp_path, command, corpus, flags):
    flags = [f"--corpus={corpora / corpus}", *flags]
    straight = command(*flags, f"--data_dir={tmp_path / 'straight'}").result()
    assert straight.returncode == 0, straight.stderr
    staging, seen = tmp_path / "data.partial", {}
    for _ in range(3):
        child = command(*flags, f"--data_dir={tmp_path / 'data'}", small=0.5)
        child.wait_for(lambda before: len(finished(staging)) > len(before), seen)
        assert child.kill() == -signal.SIGKILL
        assert not (tmp_path / "data").exists()
        now = finished(staging)
        assert seen.items() < now.items()  # it never began anew
        seen = now
        (staging / "tmp0123456").write_bytes(b"half")  # what is unfinished has another name
    last = command(*flags, f"--data_dir={tmp_path / 'data'}").result()
    assert last.returncode == 0, last.stderr
    assert last.stdout.replace("data:", "straight:") == straight.stdout
    assert contents(tmp_path / "data") == contents(tmp_path / "straight")
    assert not staging.exists()


def test_a_run_may_be_killed_at_any_time(corpora, tmp_path, command):
    data_dir = tmp_path / "data"
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={data_dir}"]
    for i in range(6):  # from its first moments to well into its work
        child = command(*flags)
        child.wait_for(lambda: data_dir.with_name("data.partial").exists() or data_dir.exists())
        time.sleep(0.02 * i)
        child.kill()
        if data_dir.exists():  # it was quicker than the kill
            assert stored_ids(data_dir, "val")
            shutil.rmtree(data_dir)
    assert command(*flags).result().returncode == 0
    straight = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'straight'}"]
    assert command(*straight).result().returncode == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "straight")


@pytest.mark.parametrize("change", ["corpus", "tokenizer", "val_fraction"])
def test_what_was_begun_for_something_else_is_not_gone_on_with(corpora, tmp_path, command, change):
    corpus = write_text(tmp_path / "text.txt", (corpora / "long.txt").read_bytes().decode())
    flags = {"corpus": corpus, "data_dir": tmp_path / "data"}
    child = command(*(f"--{key}={value}" for key, value in flags.items()), hold=True)
    child.wait_for(finished, tmp_path / "data.partial")
    child.kill()
    if change == "corpus":
        write_text(tmp_path / "text.txt")
    else:
        flags |= {"tokenizer": {"tokenizer": "bpe", "vocab_size": 300}, "val_fraction": {"val_fraction": 0.5}}[change]
    prepare_flags(**flags)
    other = prepare_flags(**flags | {"data_dir": tmp_path / "other"})
    assert contents(tmp_path / "data") == contents(tmp_path / "other")
    assert other["tokens"]["train"] > ROW
    assert not (tmp_path / "data.partial").exists()


def test_an_interrupted_run_keeps_what_it_has(corpora, tmp_path, command):
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}"]
    child = command(*flags, hold=True)
    child.wait_for(finished, tmp_path / "data.partial")
    assert child.kill(signal.SIGINT) != 0
    assert finished(tmp_path / "data.partial")
    assert command(*flags).result().returncode == 0
    assert stored_ids(tmp_path / "data", "val")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_ctrl_c_is_one_line(corpora, tmp_path, command, num_proc):
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}", f"--num_proc={num_proc}"]
    child = command(*flags, hold=True)
    child.wait_for(finished, tmp_path / "data.partial")
    assert child.kill(signal.SIGINT) == 130
    (line,) = lines_of(child.result().stderr)
    assert "interrupted" in line


def test_a_worker_that_is_killed_is_one_line(corpora, tmp_path, command):
    flags = [
        f"--corpus={corpora / 'rows.jsonl'}",
        f"--data_dir={tmp_path / 'data'}",
        "--tokenizer=bpe",
        "--num_proc=2",
    ]
    child = command(*flags, worker_dies=True)
    assert child.result().returncode == 2
    (line,) = lines_of(child.result().stderr)
    assert "a process that tokenizes has died" in line and "num_proc" in line


# ---------------------------------------------------------------------------------------------------------------------
# Two at once


def test_a_second_run_waits_for_the_first_and_finds_its_work_done(corpora, tmp_path, command):
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}"]
    first = command(*flags, hold=True)
    first.wait_for((tmp_path / "data.partial" / "lock").exists)
    second = command(*flags)
    second.wait_for(second.waits)
    first.release()
    first, second = first.result(), second.result()
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    (line,) = lines_of(second.stderr)
    assert "data.partial: another run is at work there" in line
    assert second.stdout == first.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_second_run_takes_over_from_one_that_is_killed(corpora, tmp_path, command):
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}"]
    first = command(*flags, hold=True)
    first.wait_for(finished, tmp_path / "data.partial")
    second = command(*flags)
    second.wait_for(second.waits)
    first.kill()
    assert second.result().returncode == 0, second.result().stderr
    assert stored_ids(tmp_path / "data", "val")


def test_a_second_run_with_other_text_is_refused_when_the_first_is_done(corpora, tmp_path, command):
    first = command(f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}", hold=True)
    first.wait_for((tmp_path / "data.partial" / "lock").exists)
    second = command(f"--corpus={corpora / 'rows.jsonl'}", f"--data_dir={tmp_path / 'data'}")
    second.wait_for(second.waits)
    first.release()
    second = second.result()
    assert first.result().returncode == 0
    assert second.returncode == 2
    assert "data_dir" in lines_of(second.stderr)[-1] and "was made " in lines_of(second.stderr)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# A place that cannot be written


def test_a_disk_full_from_the_start_is_one_line_and_nothing_is_left(corpora, tmp_path, command):
    # A limit on the size of files stands for the disk's: the write fails as it would there.
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}"]
    child = command(*flags, most=2**12).result()
    assert child.returncode == 2, child.stderr
    (line,) = lines_of(child.stderr)
    assert f"data_dir={tmp_path / 'data'} cannot be written" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_runs_full_costs_nothing_that_was_done(corpora, tmp_path, command):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={disk / 'data'}"]
        child = command(*flags).result()
        assert child.returncode == 2, child.stderr
        (line,) = lines_of(child.stderr)
        assert "cannot be written" in line and "No space left" in line and "data.partial" in line
        assert finished(disk / "data.partial")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert command(*flags).result().returncode == 0
        text = (corpora / "long.txt").read_bytes().decode()
        assert len(stored_ids(disk / "data", "train") + stored_ids(disk / "data", "val")) == len(text)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_without_permission_is_one_line(tmp_path, command):
    child = command(f"--corpus={write_text(tmp_path / 'text.txt')}", "--data_dir=/proc/no/data").result()
    assert child.returncode == 2
    (line,) = lines_of(child.stderr)
    assert "data_dir=/proc/no/data cannot be written" in line


# ---------------------------------------------------------------------------------------------------------------------
# A second run


def test_a_second_run_takes_under_two_seconds_and_does_not_read_the_text(tmp_path):
    corpus = write_text(tmp_path / "text.txt", FOXES * 200)
    flags = [f"--corpus={corpus}", f"--data_dir={tmp_path / 'data'}"]
    prepare_flags(corpus=corpus, data_dir=tmp_path / "data")
    before, stat = files_of(tmp_path / "data"), os.stat(corpus)
    Path(corpus).write_bytes(b"\xff" * stat.st_size)  # reading it would fail
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    times = []
    for _ in range(3):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        second = run_command(*flags)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: the machine may be busy
        times.append(ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)
        assert second.returncode == 0, second.stderr
    assert min(times) < 2, times
    assert files_of(tmp_path / "data") == before


def test_a_file_that_was_only_touched_is_the_same_text(tmp_path):
    flags = {"corpus": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data"}
    record = prepare_flags(**flags)
    os.utime(flags["corpus"], ns=(1, 1))
    assert prepare_flags(**flags) == record
    write_text(tmp_path / "text.txt", FOXES[:-1] + "!")
    with pytest.raises(ValueError, match="was made from other text"):
        prepare_flags(**flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"val_fraction": 0.2}, "made with val_fraction=0.1, not 0.2"),
        ({"text_column": "other"}, "made with text_column=text, not other"),
        ({"tokenizer": "bpe"}, "made with tokenizer=char, not bpe"),
    ],
    ids=str,
)
def test_a_data_dir_made_in_another_way_is_refused_by_name(tmp_path, flags, said):
    rows = "".join(json.dumps({"text": FOXES, "other": FOXES[::-1]}) + "\n" for _ in range(3))
    made = {"corpus": write_text(tmp_path / "rows.jsonl", rows), "data_dir": tmp_path / "data"}
    prepare_flags(**made)
    prepare_flags(**made | {"num_proc": 2, "windows": "epoch"})  # these do not matter
    with pytest.raises(ValueError, match=said):
        prepare_flags(**made | flags)


def test_a_tokenizer_that_was_changed_in_its_place_is_noticed(tmp_path):
    corpus, place = write_text(tmp_path / "text.txt"), tmp_path / "tokenizer"
    prepare_flags(corpus=corpus, data_dir=place, tokenizer="bpe", vocab_size=300)
    flags = {"corpus": corpus, "data_dir": tmp_path / "data", "tokenizer": place}
    prepare_flags(**flags)
    prepare_flags(**flags)
    file = place / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # the same, spelled otherwise
    prepare_flags(**flags)
    spec = json.loads(file.read_text())
    spec["model"]["merges"].pop()
    file.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"made with tokenizer=.*tokenizer, not "):
        prepare_flags(**flags)


# ---------------------------------------------------------------------------------------------------------------------
# A data_dir that is complete needs nothing else


@pytest.mark.parametrize("lost", ["corpus", "tokenizer"])
def test_what_a_data_dir_was_made_from_may_be_gone(tmp_path, capsys, lost):
    flags = {"corpus": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data"}
    flags["tokenizer"] = write_text(tmp_path / "characters.txt")
    record = prepare_flags(**flags)
    os.unlink(flags[lost])
    capsys.readouterr()
    assert prepare_flags(**flags) == record
    said = lines_of(capsys.readouterr().err)
    assert len(said) == (lost == "corpus") and all(flags[lost] in line and "taking" in line for line in said)
    with pytest.raises(ValueError, match="no such file"):  # another name was never seen
        prepare_flags(**flags | {"corpus": tmp_path / "other.txt"})


def test_a_corpus_on_the_web_is_fetched_once(tmp_path):
    record = prepare_flags(corpus=write_text(tmp_path / "text.txt"), data_dir=tmp_path / "data")
    address = "http://127.0.0.1:9/input.txt"  # where nobody answers
    record["corpus"] = address
    (tmp_path / "data" / "prepared.json").write_text(json.dumps(record))
    assert prepare_flags(corpus=address, data_dir=tmp_path / "data") == record
    with pytest.raises(ValueError, match="val_fraction=0.1, not 0.2"):
        prepare_flags(corpus=address, data_dir=tmp_path / "data", val_fraction=0.2)


def test_a_data_dir_of_the_earlier_layout_opens(tmp_path):
    # There, rows had a fixed length, and zeros filled up the last; the record is the same but for new keys.
    flags = {"corpus": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data"}
    record = prepare_flags(**flags)
    for split in ("train", "val"):
        ids = stored_ids(tmp_path / "data", split)
        rows = np.array(ids + [0] * (-len(ids) % ROW), dtype=np.uint16).reshape(-1, ROW)
        features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=ROW)})
        shutil.rmtree(tmp_path / "data" / split)
        datasets.Dataset.from_dict({"input_ids": rows}, features).save_to_disk(tmp_path / "data" / split)
        stream = prepare(DataArguments(**{key: str(value) for key, value in flags.items()})).stream(split)
        assert stream.read(0, len(stream)).tolist() == ids
    assert prepare_flags(**flags) == record


def test_trainer_takes_a_data_dir_as_it_is(tmp_path):
    prepare_flags(corpus=write_text(tmp_path / "text.txt"), data_dir=tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    model = make_model(n_layer=1, n_head=1, n_embd=8, block_size=ROW, vocab_size=len(tokenizer))
    trainer = Trainer(
        model,
        TrainingArguments(
            tmp_path / "out", max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True
        ),
        train_dataset=datasets.load_from_disk(tmp_path / "data")["train"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    assert np.isfinite(trainer.train().training_loss)


# ---------------------------------------------------------------------------------------------------------------------
# Splits and ids that are there already


def test_a_split_of_its_own_is_kept(tmp_path):
    tables = {"train": ["ab", "cd", "ef"], "validation": ["gh"]}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": t}) for split, t in tables.items()})
    saved.save_to_disk(tmp_path / "saved")
    flags = {"corpus": tmp_path / "saved", "data_dir": tmp_path / "data", "val_split": "validation"}
    record = prepare_flags(**flags)
    assert record["documents"] == {"train": 3, "val": 1} and record["tokens"] == {"train": 9, "val": 3}
    assert prepare_flags(**flags) == record
    with pytest.raises(ValueError, match="was made with val_split=validation, not "):
        prepare_flags(**flags | {"val_split": ""})


def test_ids_that_someone_else_made_are_taken_as_they_are(prepared_bpe, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(prepared_bpe)
    rows = [tokenizer.encode(f"{i} foxes") + [tokenizer.eos_token_id] for i in range(20)]
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(tmp_path / "rows.parquet")
    flags = {"corpus": tmp_path / "rows.parquet", "text_column": "input_ids", "data_dir": tmp_path / "data"}
    record = prepare_flags(**flags, tokenizer=prepared_bpe)
    assert record["documents"] == {"train": 18, "val": 2}
    assert stored_ids(tmp_path / "data", "val") == rows[1] + rows[11]
    with pytest.raises(ValueError, match="is tokens already, and tokenizer=char is made from text"):
        prepare_flags(**flags | {"data_dir": tmp_path / "other"})


@pytest.fixture(scope="module")
def prepared_bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    prepare_flags(corpus=write_text(folder / "text.txt"), data_dir=folder / "data", tokenizer="bpe", vocab_size=300)
    return folder / "data"


def test_shards_of_llm_c_become_a_data_dir(prepared_bpe, tmp_path):
    for name, ids in {"train_1": [1, 2, 3] * 500, "train_2": [4, 5], "val_0": [6, 7]}.items():
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / f"fineweb_{name}.bin").write_bytes(header.tobytes() + np.array(ids, dtype="<u2").tobytes())
    prepare_flags(corpus=tmp_path / "*.bin", tokenizer=prepared_bpe, data_dir=tmp_path / "data")
    assert stored_ids(tmp_path / "data", "train") == [1, 2, 3] * 500 + [4, 5]
    assert stored_ids(tmp_path / "data", "val") == [6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's own prepared folder


def write_bins(folder, train, val, dtype=np.uint16):
    folder.mkdir()
    np.array(train, dtype=dtype).tofile(folder / "train.bin")
    np.array(val, dtype=dtype).tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")  # unpickling it would run a command
    return folder


def test_bins_of_characters_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stoi = {character: i for i, character in enumerate(sorted(set(FOXES)))}
    ids = [stoi[character] for character in FOXES]
    bins, text = write_bins(tmp_path / "bins", ids[:3000], ids[3000:]), write_text(tmp_path / "text.txt")
    flags = {"corpus": bins, "tokenizer": text, "data_dir": tmp_path / "data"}
    record = prepare_flags(**flags)
    assert stored_ids(tmp_path / "data", "train") == ids[:3000]
    assert stored_ids(tmp_path / "data", "val") == ids[3000:]
    assert record["vocab_size"] == len(stoi) and record["tokens"] == record["bytes"]
    assert prepare_flags(**flags) == record
    assert not (tmp_path / "pwned").exists()
    np.array(ids[3:], dtype=np.uint16).tofile(bins / "val.bin")
    with pytest.raises(ValueError, match="was made from other text"):
        prepare_flags(**flags)


@needs_gpt2
def test_bins_of_gpt2s_tokens_count_documents_and_bytes(tmp_path):
    encoding = tiktoken.get_encoding("gpt2")
    documents = [f"caf\u00e9 {i} {END_TEXT}" for i, END_TEXT in enumerate(["\U0001f600", "x", "\r\n"])]
    ids = [i for text in documents for i in [*encoding.encode_ordinary(text), encoding.eot_token]]
    bins = write_bins(tmp_path / "bins", ids, ids[:9])
    record = prepare_flags(corpus=bins, tokenizer="gpt2", data_dir=tmp_path / "data")
    assert stored_ids(tmp_path / "data", "train") == ids
    assert record["documents"]["train"] == 3
    assert record["bytes"]["train"] == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize(
    "change, tokenizer, said",
    [
        (lambda bins: (bins / "train.bin").write_bytes(b"odd"), None, r"train\.bin has 3 bytes.*cut short"),
        (
            lambda bins: np.array([70], np.uint16).tofile(bins / "val.bin"),
            None,
            r"val\.bin has the id 70, but .* only",
        ),
        (lambda bins: (bins / "val.bin").write_bytes(b""), None, "val split has 0 tokens"),
        (lambda bins: None, "char", "is tokens already, and tokenizer=char is made from text"),
        (lambda bins: None, "bpe", "is tokens already, and tokenizer=bpe is made from text"),
    ],
)
def test_bins_that_cannot_be_are_refused_in_one_line(tmp_path, change, tokenizer, said):
    bins, text = write_bins(tmp_path / "bins", [0, 1, 2] * 9, [2, 1, 0] * 9), write_text(tmp_path / "text.txt", "abc")
    change(bins)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=said) as raised:
        prepare_flags(corpus=bins, tokenizer=tokenizer or text, data_dir=tmp_path / "data")
    assert "\n" not in str(raised.value) and files_of(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def test_progress_is_shown_where_somebody_watches(corpora, tmp_path):
    screen, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100)) if hasattr(termios, "tcsetwinsize") else pytest.skip("Python 3.10")
    flags = [f"--corpus={corpora / 'long.txt'}", f"--data_dir={tmp_path / 'data'}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "tokenization.prepare", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # which is how a screen ends
        while part := os.read(screen, 2**12):
            shown += part
    out, _ = child.communicate(timeout=PATIENCE)
    os.close(screen)
    assert child.returncode == 0
    assert b"100%" in shown and re.search(rb"[1-9][\d.]* examples/s", shown)
    train, val, whole = out.decode().splitlines()
    assert "1 documents" in train and "bytes a token" in train and "0 unknown" in train


def test_unknowns_are_counted(tmp_path):
    prepare_flags(corpus=write_text(tmp_path / "text.txt", "abc " * 99), data_dir=tmp_path / "abc")
    corpus = write_corpus(tmp_path / "corpus", ["ab\u20ac\u20ac", "\U0001f600c", "abc"])
    record = prepare_flags(corpus=corpus, data_dir=tmp_path / "data", tokenizer=tmp_path / "abc")
    assert record["unknowns"] == {"train": 2, "val": 1}


def test_a_bpe_is_trained_on_the_beginning_of_a_long_text(tmp_path, monkeypatch):
    text = "abc " * 5000 + "xyz " * 90_000
    monkeypatch.setattr("tokenization.making.BPE_SAMPLE", 10_000)
    monkeypatch.setattr("tokenization.documents.BLOCK", 2**12)
    flags = {"tokenizer": "bpe", "vocab_size": 262}
    prepare_flags(corpus=write_text(tmp_path / "text.txt", text), data_dir=tmp_path / "data", **flags)
    vocabulary = json.loads((tmp_path / "data" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "\u0120abc" in vocabulary and "yz" not in vocabulary


def test_reading_is_left_to_the_corpus(tmp_path):
    corpus = open_corpus(DataArguments(corpus=write_text(tmp_path / "text.txt", "ab " * 10)))
    assert "".join(text for text, *_ in corpus.read()) == "ab " * 10
    assert prepare(DataArguments(corpus.name, data_dir=str(tmp_path / "data"))).record["documents"] == {
        "train": 1,
        "val": 1,
    }
