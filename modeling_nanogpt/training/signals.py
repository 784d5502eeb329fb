"""Signals are requests that the loop fulfils between two steps: SIGTERM, SIGINT, SIGHUP to stop, SIGUSR1 to save.

An evaluation may take minutes, but torchrun kills a run 30 seconds after it has passed a signal on. So a run that is
asked to stop leaves an evaluation between two batches.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

# a terminal that is closed sends SIGHUP; Windows has neither SIGHUP nor SIGUSR1
STOPPING = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


class Interrupted(Exception):
    """Raised in an evaluation that ends early, because a signal asks to stop."""


CHECKS: list[Callable[[], None]] = []  # one for each context `interrupting` that is open


def leave_if_asked() -> None:
    """Leave the open context `interrupting` if a signal asks to stop. Every process must call this."""
    for check in CHECKS:
        check()


class Signals:
    """Requests that this process, or another process of the run, received.

    After `poll`, `stop` is the number of the signal that asks to stop, or 0, and `save` says whether to save now.
    """

    def __init__(self):
        self.stop, self.save = 0, False
        self._stop, self._stopped_at, self._save = 0, 0.0, False
        self._before = {number: signal.signal(number, self._receive) for number in signals_to_receive()}
        # a group of its own on the CPU: through the GPUs' group, each poll would wait for the device
        self._group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None

    def _receive(self, number: int, frame) -> None:
        if number in SAVING:
            self._save = True
        elif not self._stop:
            self._stop, self._stopped_at = number, time.monotonic()
            line = f"\n{signal.Signals(number).name}: saving after this step; again to quit at once\n"
            with suppress(OSError):  # Ctrl-C may have ended the `tee` that reads this, before it came here
                os.write(2, line.encode())  # print would fail if the signal has interrupted another print
        elif time.monotonic() - self._stopped_at > 1:  # within a second, a launcher passes on the first signal
            os._exit(128 + number)

    def poll(self) -> None:
        """Update `stop` and `save`. They are the same on every process, and every process must call this."""
        self.stop, self.save = self._agree(self._stop), bool(self._agree(self._save))
        if self.save:
            self._save = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A context that leave_if_asked leaves if a signal asks to stop."""

        def check() -> None:
            self.stop = self._agree(self._stop)
            if self.stop:
                raise Interrupted

        CHECKS.append(check)
        try:
            with suppress(Interrupted):
                yield
        finally:
            CHECKS.pop()

    def _agree(self, request: int) -> int:
        """The largest of the requests of all processes."""
        if self._group is None:
            return int(request)
        requests = torch.tensor([int(request)])
        torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(requests)

    def restore(self) -> None:
        """From here on, signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def signals_to_receive() -> list[signal.Signals]:
    """The signals that can come to this process. Python gives them to its main thread alone: a notebook's, perhaps."""
    if threading.current_thread() is not threading.main_thread():
        return []
    # `nohup` lets a process ignore SIGHUP
    return [number for number in STOPPING + SAVING if signal.getsignal(number) is not signal.SIG_IGN]
