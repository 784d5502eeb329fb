"""The prepare command in processes of their own."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from support import PATIENCE, ROOT
from support.forks import fork


class Command:
    """`python -m tokenization.prepare` with these flags, as a process that a test may kill.

    small: files and batches are so small that a text of a megabyte has many, and the process rests so many seconds
    after each shard; with hold=True, only release() ends that rest. most: the largest size of a file in bytes; writing
    beyond it fails. worker_dies: the process that tokenizes is killed.
    """

    def __init__(
        self, folder: Path, *flags, small: float | None = None, hold=False, most: int | None = None, worker_dies=False
    ):
        folder.mkdir(exist_ok=True)
        self.said = folder / "stdout", folder / "stderr"
        self.released = folder / "released"
        released = str(self.released) if hold else None
        self.process = fork(run, list(map(str, flags)), small, released, most, worker_dies, *map(str, self.said))

    def wait_for(self, condition, *arguments) -> None:
        """Wait until a condition holds. It must hold before the process ends."""
        deadline = time.monotonic() + PATIENCE
        while not condition(*arguments):
            assert self.process.is_alive() or condition(*arguments), self.result()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def waits(self) -> bool:
        """Whether it has said that another run is at work."""
        return self.said[1].exists() and "another run" in self.said[1].read_text()

    def release(self) -> None:
        self.released.touch()

    def result(self) -> SimpleNamespace:
        """The exit status and the output of the process, once it has ended."""
        self.process.join(PATIENCE)
        stdout, stderr = (path.read_bytes().decode() if path.exists() else "" for path in self.said)
        return SimpleNamespace(returncode=self.process.exitcode, stdout=stdout, stderr=stderr)

    def kill(self, number: int = signal.SIGKILL) -> int:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self.process.pid, number)
        self.process.join(PATIENCE)
        return self.process.exitcode


def run(
    flags: list[str],
    small: float | None,
    released: str | None,
    most: int | None,
    worker_dies: bool,
    stdout: str,
    stderr: str,
) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that forks has it ignored
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  until it ends
    from tokenization import documents, making, prepare

    if small is not None:
        documents.BLOCK, making.STRETCH, making.SHARD, making.ROWS, making.PART = 2**12, 2**12, 2**15, 4, 32
        shards_of = making.shards_of

        def slowly(pieces):
            for shard in shards_of(pieces):
                yield shard
                time.sleep(small)
                while released is not None and not os.path.exists(released):
                    time.sleep(0.005)

        making.shards_of = slowly
    if worker_dies:
        making.encode_texts = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    if most is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.argv = ["prepare", *flags]
    try:
        prepare.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_command(*flags, **options):
    """`python -m tokenization.prepare` as a user starts it, until it ends."""
    return subprocess.run(
        [sys.executable, "-m", "tokenization.prepare", *flags],
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def lines_of(stderr):
    """What a process wrote on stderr, line by line, apart from progress bars."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|.*\d+/\d+ \[", line)]
