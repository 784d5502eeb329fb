"""The processes that tokenize: what happens if one of them dies, or runs a script that was not written for them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import multiprocess  # what `datasets` starts its processes with
from multiprocess.process import current_process

DIED = (
    "a process that tokenizes has died, perhaps for want of memory: take a smaller --num_proc. (A script of your own "
    'needs `if __name__ == "__main__":` around what it does, if it takes more than one process)'
)
GRACE = 5  # seconds after the end of a worker in which the pool may close by itself


def leave_if_worker() -> None:
    """End this process if it is a worker that has only just been started, and imports the script of its parent.

    If processes are spawned, a script without `if __name__ == "__main__":` would prepare its data in every worker,
    and each of them would wait for the parent. The parent sees that the worker has died, and says why.
    """
    if getattr(current_process(), "_inheriting", False):
        os._exit(1)


@contextmanager
def watched_workers() -> Iterator[None]:
    """Raise OSError if a worker dies.

    `datasets` notices most deaths. But when it closes its pool, it waits for ever for a lock that a dead worker held,
    so an alarm ends this waiting. Only the main thread of a process gets signals, and Windows has no such signals.
    """
    ended = []

    def note(*_):
        ended.append(True)
        signal.alarm(GRACE)

    def stop(_, frame: FrameType | None):
        while frame:
            if frame.f_code.co_name == "_help_stuff_finish":  # the function of the pool that waits for the lock
                raise OSError(DIED)
            frame = frame.f_back

    watching = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    if watching:
        before = [signal.signal(signal.SIGCHLD, note), signal.signal(signal.SIGALRM, stop)]
    try:
        yield
    except Exception as error:
        lost = isinstance(error, EOFError | ConnectionError | multiprocess.TimeoutError) and ended
        if not lost and DIED not in str(error) and "abruptly died" not in str(error):
            raise
        for worker in multiprocess.active_children():
            worker.kill()
        raise OSError(DIED) from None
    finally:
        if watching:
            signal.alarm(0)
            signal.signal(signal.SIGCHLD, before[0])
            signal.signal(signal.SIGALRM, before[1])
