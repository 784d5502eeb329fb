"""make goes on after an interrupted installation or run, and refuses in one line what it cannot do.

The Makefile is the real one. A script takes the place of Python and notes its arguments, so nothing is installed.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import PATIENCE, ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# `-m venv` copies the script to the place of Python in a virtual environment. $SLOW names the call that takes long.
PYTHON = """#!/bin/sh
[ "$1" = -V ] && { echo "Python VERSION"; exit; }
[ "$1" = -c ] && exit STATUS
echo "$*" >> "$CALLS"
case "$*" in
    *"$SLOW"*) echo started > started; exec sleep 60 ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""
PIP_INSTALL = "-m pip install --no-compile -c constraints.txt -e"
INSTALL = ["-m venv .venv", f"{PIP_INSTALL} .[fast]"]  # for the quickstart
COMPLETE = [*INSTALL, f"{PIP_INSTALL} .[fast,test,dev]"]  # for all else
TEST = "-m pytest -n logical --maxprocesses=4 --dist=worksteal"
TRAIN = "train_accelerate.py hub_configs/quickstart.yaml"
SAMPLE = "-m modeling_nanogpt.sample out/quickstart --seed 3 --num_samples 1 --max_new_tokens 150 "
SAMPLE += '--prompt def  --prompt class  --prompt """'  # each in quotes in the Makefile


def write_python(folder: Path, name: str, version: str) -> None:
    too_old = tuple(map(int, version.split("."))) < (3, 10)
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(PYTHON.replace("VERSION", version).replace("STATUS", str(int(too_old))))
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile. Its path holds a space, and letters that are not ASCII."""
    folder = tmp_path / "Käse & Brot" / "nano gpt"
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    write_python(folder, "python3", "3.11.7")
    write_python(folder, "python3.12", "3.12.1")
    write_python(folder, "python3.9", "3.9.18")
    return folder


def start(folder: Path, *command: str, slow: str = "nothing") -> subprocess.Popen:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    ours = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "SLOW": slow}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=inherited | ours, start_new_session=True, **pipes)


def make(folder: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """The exit status of make, its output, and the arguments of each call of Python."""
    (folder / "calls").unlink(missing_ok=True)
    process = start(folder, "make", *arguments)
    said, _ = process.communicate(timeout=PATIENCE)
    calls = folder / "calls"
    return process.returncode, said, calls.read_text().splitlines() if calls.exists() else []


def interrupt(folder: Path, *arguments: str, slow: str) -> None:
    """Ctrl-C, as a terminal sends it to make and its children, during the call of Python that `slow` names."""
    process = start(folder, "make", *arguments, slow=slow)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0


def test_a_second_quickstart_installs_nothing_again(checkout):
    assert make(checkout, "quickstart")[2] == [*INSTALL, TRAIN, SAMPLE]
    assert make(checkout, "quickstart")[2] == [TRAIN, SAMPLE]


def test_a_quickstart_with_a_checkpoint_goes_on_from_there(checkout):
    make(checkout, "quickstart")
    (checkout / "out" / "quickstart" / "checkpoints" / "step-00000700").mkdir(parents=True)
    assert make(checkout, "quickstart")[2] == [f"{TRAIN} --init_from=resume", SAMPLE]


def test_a_changed_constraint_is_installed_into_the_same_environment(checkout):
    make(checkout, "test")
    os.utime(checkout / ".venv" / "installed", (0, 0))
    assert make(checkout, "test")[2] == [*COMPLETE[1:], TEST]


@pytest.mark.parametrize("slow", COMPLETE)
def test_an_interrupted_installation_is_made_anew(checkout, slow):
    interrupt(checkout, "test", slow=slow)
    left_behind = checkout / ".venv" / "half-written"
    left_behind.touch()
    assert make(checkout, "test")[2] == [*COMPLETE, TEST]
    assert not left_behind.exists()
    assert make(checkout, "test")[2] == [TEST]


def test_an_interrupted_run_leaves_the_installation_alone(checkout):
    interrupt(checkout, "quickstart", slow="train_accelerate.py")
    assert make(checkout, "quickstart")[2] == [TRAIN, SAMPLE]


def test_an_environment_of_the_users_own_is_kept(checkout):
    assert start(checkout, "python3", "-m", "venv", ".venv").wait(timeout=PATIENCE) == 0  # as docs/install.md has it
    own = checkout / ".venv" / "own-package"
    own.touch()
    assert make(checkout, "test")[2] == [*COMPLETE[1:], TEST]
    assert own.exists()


def test_another_python_is_taken_for_a_new_environment(checkout):
    assert make(checkout, "test", "PYTHON=python3.12")[2] == [*COMPLETE, TEST]
    assert make(checkout, "test", "PYTHON=python3.12")[2] == [TEST]
    assert make(checkout, "test")[2] == [TEST]  # without PYTHON, the environment that is there


@pytest.mark.parametrize("outdated", [False, True])
def test_another_python_than_the_environments_is_refused_in_one_line(checkout, outdated):
    make(checkout, "test")
    if outdated:
        os.utime(checkout / ".venv" / "installed", (0, 0))
    status, said, calls = make(checkout, "test", "PYTHON=python3.12")
    assert status == 2 and calls == []
    first, second = said.splitlines()
    assert first == ".venv has Python 3.11.7, but PYTHON=python3.12 is Python 3.12.1: remove .venv first"
    assert second.startswith("make: ***")


def test_a_python_that_is_too_old_is_refused_in_one_line(checkout):
    status, said, calls = make(checkout, "test", "PYTHON=python3.9")
    assert status == 2 and calls == [] and not (checkout / ".venv").exists()
    first, second = said.splitlines()
    assert first == "python3.9 must be Python 3.10 or later: make PYTHON=python3.11 test takes another"
    assert second.startswith("make: ***")


@pytest.mark.parametrize("installed", [False, True])
def test_a_python_that_does_not_run_is_named_in_one_line(checkout, installed):
    if installed:
        make(checkout, "test")
    status, said, calls = make(checkout, "test", "PYTHON=python3.77")
    assert status == 2 and calls == [] and (checkout / ".venv").exists() == installed
    first, second = said.splitlines()
    assert first == "PYTHON=python3.77 does not run: make PYTHON=/path/to/python3.11 test names another"
    assert second.startswith("make: ***")


def test_an_environment_whose_python_is_gone_is_named(checkout):
    make(checkout, "test")
    (checkout / ".venv" / "bin" / "python").unlink()
    (checkout / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    status, said, _ = make(checkout, "test")
    assert status == 2
    assert "the Python that made .venv is gone: remove .venv, and make sets it up anew\n" in said
