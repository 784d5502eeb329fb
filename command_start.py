"""How each command begins, so that neither a pipe nor a terminal can spoil its work.

All that a command says passes through here: print, progress bars, warnings and errors. Perhaps nobody reads it any
more (`| head`, or a `tee` that Ctrl-C has ended), and perhaps the console lacks a character. The command goes on all
the same. This file belongs to no room, because the commands of all rooms begin with it.
"""

import gc
import io
import os
import runpy
import signal
import sys
import threading
from functools import partial
from types import TracebackType
from typing import Any, TextIO


class LossyFile(io.RawIOBase):
    """Bytes on their way to a text stream. If they cannot be written, they are dropped: a write never fails."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream  # would close what is below it, if nobody held it
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer in between

    def write(self, data) -> int:
        try:
            written = self._raw.write(data)
            if written is None:  # the pipe is full, and somebody has told it not to wait for its reader
                os.set_blocking(self.fileno(), True)
                written = self._raw.write(data)
            return written or 0
        except OSError:  # nobody reads the pipe, the terminal is closed, the disk is full
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


def begin_command(program: str) -> None:
    """From here on, what the process says cannot stop it, and Ctrl-C ends it with one line and exit status 130."""
    # Imports make objects by the hundred thousand. Looking for garbage among them takes a tenth of the start-up, so
    # Python looks less often, as long as the command runs: training makes some 50 cycles of objects in a step.
    gc.set_threshold(20_000)
    fill_descriptors()
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
    interrupts = []

    def interrupt(*_):
        interrupts.append(True)
        raise KeyboardInterrupt

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # a library that is interrupted while it is imported may raise something else
        if not interrupts and not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        print(f"\n{program}: interrupted", file=sys.stderr)
        raise SystemExit(130)

    def interrupt_again(lost) -> None:
        """Python drops what is raised in a __del__. If that was Ctrl-C, the signal comes once more."""
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
        else:
            sys.__unraisablehook__(lost)

    sys.excepthook, sys.unraisablehook = end, interrupt_again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else this process is to ignore Ctrl-C
        signal.signal(signal.SIGINT, interrupt)


def fill_descriptors() -> None:
    """Open /dev/null in place of a standard stream that was closed (`>&-`).

    Otherwise the next file that the process opens would get its number, and with it what libraries print.
    """
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number


def lossy(stream: TextIO | None) -> TextIO:
    """The same stream, on which no write fails. A character that the encoding lacks is shown as a question mark."""
    if stream is None:  # Python found it closed
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # a notebook has streams of its own
        return stream
    buffer = io.BufferedWriter(LossyFile(stream))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors="replace", line_buffering=True)


# ---------------------------------------------------------------------------------------------------------------------
# The installed commands, nanogpt-train and others: each runs a module of the project as `python -m` does


def run(module: str) -> None:
    """Run a module as its own program.

    While Python looks for the module, sys.argv and sys.orig_argv are what `python -m MODULE` would make them: from
    that, modeling_nanogpt sees that a command starts, and does not import torch before the command has read its flags.
    """
    sys.orig_argv = [sys.executable, "-m", module, *sys.argv[1:]]
    sys.argv = ["-m", *sys.argv[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


train = partial(run, "train_accelerate")
prepare = partial(run, "tokenization.prepare")
sample = partial(run, "modeling_nanogpt.sample")
convert = partial(run, "modeling_nanogpt.convert")
evaluate = partial(run, "modeling_nanogpt.evaluate")
compare = partial(run, "modeling_nanogpt.compare")
demo = partial(run, "modeling_nanogpt.demo")
sizing = partial(run, "modeling_nanogpt.sizing")
