"""The commands of the project in processes of their own, which see nothing but files."""

import runpy
import sys
from pathlib import Path

from support.forks import fork
from support.runs import call, finish


def command(folder: Path, name: str, *argv) -> tuple[int, list[str]]:
    """Run a module as `python -m NAME` does: its exit status, and what it said, line by line. `folder` takes a log."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    (status,) = finish(fork(call, run_module, (name, [str(each) for each in argv]), str(log), {}))
    return status, log.read_text().splitlines() if log.exists() else []


def run_module(name: str, argv: list[str]) -> None:
    """What the process does."""
    sys.argv = [name, *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
