"""Signals are requests that the loop fulfils between two steps: SIGTERM, SIGINT, SIGHUP to stop, SIGUSR1 to save."""

import os
import signal
import threading
import time
from contextlib import suppress

import torch

# a terminal that is closed sends SIGHUP; Windows has neither SIGHUP nor SIGUSR1
STOPPING = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


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
        stop, save = self._stop, self._save
        if self._group is not None:
            requests = torch.tensor([stop, int(save)])
            torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX, group=self._group)
            stop, save = int(requests[0]), bool(requests[1])
        self.stop, self.save = stop, save
        if save:
            self._save = False

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
