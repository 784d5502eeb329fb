"""Ctrl-C ends each command with one line and exit status 130, wherever the command is."""

import os
import shutil
import subprocess
import sys

import pytest

from support import PATIENCE, ROOT
from support.texts import write_words
from support.tiny_run import TINY, write_recipe

# Runs a module as `python -m` does, and has this process get SIGINT when it comes to an event: the audit event whose
# name and first argument are given. torch lets go of its own interrupts, so the last one raises something else.
PRESS = """
import os, runpy, signal, sys
event, what, module = sys.argv[1:4]
pressed = []

def press(name, arguments):
    if name == event and what in str(arguments[0]) and not pressed:
        pressed.append(True)
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(press)
sys.orig_argv = [sys.executable, "-m", module, *sys.argv[4:]]
sys.argv = ["-m", *sys.argv[4:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
TRAIN = ["train_accelerate", "recipe.yaml", "--out_dir=out"]
PREPARE = ["tokenization.prepare", "--corpus=corpus.txt", "--data_dir=data"]
SAMPLE = ["modeling_nanogpt.sample", "model"]
CONVERT = ["modeling_nanogpt.convert", "model", "out", "--to", "gpt2"]


@pytest.fixture
def folder(run, tmp_path):
    write_words(tmp_path / "corpus.txt")
    write_recipe(tmp_path / "recipe.yaml", **TINY | {"corpus": "corpus.txt", "data_dir": "data"})
    shutil.copytree(run.out_dir, tmp_path / "model")
    return tmp_path


def press(folder, event, what, command):
    """Returns exit status and stderr of a command that is interrupted at an event."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", PRESS, event, what, *command]
    process = subprocess.run(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    return process.returncode, process.stderr


@pytest.mark.parametrize(
    ("event", "what", "command"),
    [
        ("import", "numpy", TRAIN),
        ("import", "torch._dynamo", TRAIN),
        ("import", "datasets", TRAIN),
        ("open", "data.partial/whole", TRAIN),
        ("import", "transformers", SAMPLE),
        ("open", "model/tokenizer.json", SAMPLE),
        ("import", "numpy.linalg", CONVERT),
        ("open", "out.partial", CONVERT),
        ("import", "pyarrow", PREPARE),
        ("open", "data.partial/whole", PREPARE),
    ],
)
def test_ctrl_c_ends_a_command_in_one_line(event, what, command, folder):
    status, said = press(folder, event, what, command)
    assert status == 130, said
    assert "Traceback" not in said and "interrupted" in said.splitlines()[-1] or "stopped" in said.splitlines()[-1]
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()


IN_A_DESTRUCTOR = """
import os, signal, time
from command_start import begin_command

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

begin_command("this")
Dying()
time.sleep(60)
"""


def test_ctrl_c_in_a_destructor_is_not_lost():
    # SIGINT is ignored in what a shell starts in the background, and pytest may be such a process
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + IN_A_DESTRUCTOR
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=50)
    assert (child.returncode, child.stderr) == (130, "\nthis: interrupted\n")
