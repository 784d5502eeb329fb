"""Signals are requests that the loop fulfils between two steps: SIGTERM and SIGINT to stop, SIGUSR1 to save."""

import os
import signal
import time

import torch

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # Windows has no SIGUSR1


class Signals:
    """Requests that this process, or another process of the run, received.

    After `poll`, `stop` is the number of the signal that asks to stop, or 0, and `save` says whether to save now.
    """

    def __init__(self):
        self.stop, self.save = 0, False
        self._stop, self._stopped_at, self._save = 0, 0.0, False
        self._before = {number: signal.signal(number, self._receive) for number in STOPPING + SAVING}
        # a group of its own on the CPU: through the GPUs' group, each poll would wait for the device
        self._group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None

    def _receive(self, number: int, frame) -> None:
        if number in SAVING:
            self._save = True
        elif not self._stop:
            self._stop, self._stopped_at = number, time.monotonic()
            line = f"\n{signal.Signals(number).name}: saving after this step; again to quit at once\n"
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
