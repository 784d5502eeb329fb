"""What a command says cannot stop it: nobody reads it, nobody can read it, or the console lacks a character."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from modeling_nanogpt.training.checkpointing import newest_complete
from support import PATIENCE, ROOT
from support.forks import fork
from support.runs import finish
from support.texts import write_words
from support.tiny_run import TINY, write_recipe

TRAIN = [sys.executable, str(ROOT / "train_accelerate.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}

# ---------------------------------------------------------------------------------------------------------------------
# Where the words of a process may go. Each function opens such a place and returns its descriptor.


def a_reader_that_quits(folder):
    return os.open(folder / "fifo", os.O_WRONLY)  # waits until the test reads


def nobody(folder):
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def a_full_disk(folder):
    return os.open("/dev/full", os.O_WRONLY)


def a_closed_terminal(folder):
    terminal, ours = os.openpty()
    os.close(terminal)
    return ours


def a_pipe_that_does_not_wait(folder):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.write(writing, bytes(2**20))  # as much as fits

    def read():
        time.sleep(0.5)
        with open(reading, "rb") as pipe, open(folder / "log", "wb") as log:
            shutil.copyfileobj(pipe, log)

    threading.Thread(target=read, daemon=True).start()
    return writing


def an_ascii_console(folder):
    return os.open(folder / "log", os.O_WRONLY | os.O_CREAT)


PLACES = [a_reader_that_quits, nobody, a_full_disk, a_closed_terminal, a_pipe_that_does_not_wait, an_ascii_console]


def speak_into(place, folder, script, argv):
    """Run a command as Python would start it, with stdout and stderr in a place."""
    descriptor = place(folder)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    encoding = "ascii" if place is an_ascii_console else "utf-8"
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding=encoding, closefd=False) for number in (1, 2))
    sys.argv = [script, *argv]
    os.chdir(folder)
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    print("é")  # not by the command, but through what the command has made of stdout


@pytest.fixture
def folder(run, tmp_path):
    """A folder with a text, a recipe and a model, whose name is not ASCII."""
    folder = tmp_path / "größe"
    folder.mkdir()
    write_words(folder / "corpus.txt")
    steps = {"max_iters": 4, "eval_interval": 2, "eval_tokens": 64}
    write_recipe(folder / "recipe.yaml", **TINY | {"corpus": "corpus.txt", "data_dir": "data"} | steps)
    shutil.copytree(run.out_dir, folder / "modèle")
    os.mkfifo(folder / "fifo")
    return folder


COMMANDS = {
    "train": (str(ROOT / "train_accelerate.py"), ["recipe.yaml", "--out_dir=né"], "né/model.safetensors"),
    "prepare": ("tokenization.prepare", ["--corpus=corpus.txt", "--data_dir=né"], "né/prepared.json"),
    "convert": ("modeling_nanogpt.convert", ["modèle", "né", "--to", "gpt2"], "né/model.safetensors"),
    "sample": ("modeling_nanogpt.sample", ["modèle", "--prompt", "é", "--max_new_tokens", "5"], "modèle"),
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finishes_whatever_becomes_of_its_words(command, place, folder):
    script, argv, made = COMMANDS[command]
    process = fork(speak_into, place, folder, script, argv)
    if place is a_reader_that_quits:
        with open(folder / "fifo", "rb") as pipe:
            assert pipe.readline()
    assert finish(process) == [0]
    assert (folder / made).exists()
    if place is an_ascii_console:
        assert "?" in (folder / "log").read_text(encoding="ascii")


# ---------------------------------------------------------------------------------------------------------------------
# As a shell starts them


# bash cannot hear a signal that its parent ignores, as under nohup
HEAR_SIGHUP = (
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)


def shell(script, folder, **options):
    """Run a line of bash in a folder. Its status is that of the first command in a pipe that fails."""
    command = [sys.executable, "-c", HEAR_SIGHUP, "bash", "-c", f"set -o pipefail; {script}"]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL, **options)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_finishes_without_the_streams_that_are_closed(closed, folder):
    assert shell(f"{' '.join(TRAIN)} recipe.yaml --out_dir=out {closed}", folder).wait(PATIENCE) == 0
    assert (folder / "out" / "model.safetensors").exists()


def test_a_closed_stream_gives_its_number_to_no_file(folder):
    script = "from command_start import begin_command; begin_command('x'); print(open('recipe.yaml').fileno())"
    command = shell(f'exec 2>&- <&-; {sys.executable} -c "{script}"', folder, stdout=subprocess.PIPE)
    assert int(command.communicate(timeout=PATIENCE)[0]) > 2


def test_python_ends_well_when_the_reader_of_help_has_quit(folder):
    command = shell(f"{' '.join(TRAIN)} --help | head -1", folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = command.communicate(timeout=PATIENCE)
    assert (command.returncode, err) == (0, b"") and out.startswith(b"usage:")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_tee_first_costs_no_checkpoint(number, status, folder):
    flags = "--max_iters=100000 --eval_interval=100000 --out_dir=out"
    command = shell(f"{' '.join(TRAIN)} recipe.yaml {flags} 2>&1 | tee log", folder, start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    while not re.search("step 0: .*", (folder / "log").read_text() if (folder / "log").exists() else ""):
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # training has begun
    os.killpg(command.pid, number)  # as a terminal does: the trainer, tee and the shell get it
    assert command.wait(PATIENCE) in (status, -number)  # SIGHUP ends the shell, too
    while subprocess.run(["pgrep", "-g", str(command.pid)], capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert newest_complete(folder / "out") is not None


# ---------------------------------------------------------------------------------------------------------------------
# Files are UTF-8, whatever the locale


ASCII = "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0"


def test_a_run_in_an_ascii_locale_writes_utf8(folder, tmp_path):
    folder = folder.rename(tmp_path / "folder")
    (folder / "corpus.txt").write_text("Größe, π und 日本語. " * 300, encoding="utf-8")
    assert shell(f"{ASCII} {' '.join(TRAIN)} recipe.yaml --out_dir=out 2>log", folder).wait(PATIENCE) == 0
    assert shell(f"{' '.join(TRAIN)} recipe.yaml --data_dir=control --out_dir=utf8 2>log", folder).wait(PATIENCE) == 0
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (folder / "out" / name).read_bytes() == (folder / "utf8" / name).read_bytes()
    for name in ("README.md", "run.yaml", "history.jsonl"):
        (folder / "out" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["corpus", "data_dir", "out_dir"])
@pytest.mark.parametrize("by", ["command line", "recipe"])
def test_a_name_that_the_locale_cannot_spell_is_refused(by, flag, folder):
    write_recipe(folder / "other.yaml", **{flag: "'donn\\u00e9es'".replace("'", '"')})
    argv = "other.yaml" if by == "recipe" else f"recipe.yaml --{flag}=données"
    process = shell(f"{ASCII} {' '.join(TRAIN)} {argv}", folder, stderr=subprocess.PIPE)
    said = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 2 and said.count("\n") == 1
    assert flag in said and "PYTHONUTF8=1" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_no_file_is_opened_in_the_encoding_of_the_locale(command, folder):
    script, argv, _ = COMMANDS[command]
    module = script if script.endswith(".py") else f"-m {script}"
    python = f"{sys.executable} -X warn_default_encoding -W always::EncodingWarning"
    done = shell(f"{python} {module} {' '.join(argv)}", folder, stderr=subprocess.PIPE, text=True)
    said = done.communicate(timeout=PATIENCE)[1]
    assert done.returncode == 0
    ours = [line for line in said.splitlines() if line.startswith(str(ROOT)) and "site-packages" not in line]
    assert not [line for line in ours if "EncodingWarning" in line]
