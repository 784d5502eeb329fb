"""Signals as wishes that the loop fulfils between two steps: SIGTERM and SIGINT to stop, SIGUSR1 to save."""

import os
import signal
import time

import torch

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # Windows has none


class Signals:
    """What this process and those beside it were asked for since the last look."""

    def __init__(self):
        self._stop, self._stopped_at, self._save = 0, 0.0, False
        self._before = {number: signal.signal(number, self._receive) for number in STOPPING + SAVING}
        # On GPUs this group spares the step from waiting for the device.
        self._group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None

    def _receive(self, number: int, frame) -> None:
        if number in SAVING:
            self._save = True
        elif not self._stop:
            self._stop, self._stopped_at = number, time.monotonic()
            line = f"\n{signal.Signals(number).name}: saving after this step; again to quit at once\n"
            os.write(2, line.encode())  # print would fail where the signal has interrupted one
        elif time.monotonic() - self._stopped_at > 1:  # within a second it is a launcher that passes on the first
            os._exit(128 + number)

    def poll(self) -> tuple[int, bool]:
        """The signal that asks to stop, or 0, and whether to save: the same on every process, which all call it."""
        if self._group is None:
            stop, save = self._stop, self._save
        else:
            wishes = torch.tensor([self._stop, int(self._save)])
            torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self._group)
            stop, save = wishes[0].item(), bool(wishes[1])
        self._save = self._save and not save
        return stop, save

    def restore(self) -> None:
        """From here on signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
