"""The processes that tokenize: what happens if one of them dies, or runs a script that was not written for them."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import multiprocess.pool  # what `datasets` starts its processes with
from multiprocess.process import BaseProcess, current_process

DIED = (
    "a process that tokenizes has died, perhaps for want of memory: take a smaller --num_proc. (A script of your own "
    'needs `if __name__ == "__main__":` around what it does, if it takes more than one process)'
)
TICK = 0.05  # seconds between two looks at the processes


def leave_if_worker() -> None:
    """End this process if it is a worker that has only just been started, and imports the script of its parent.

    If processes are spawned, a script without `if __name__ == "__main__":` would prepare its data in every worker,
    and each of them would wait for the parent. The parent sees that the worker has died, and says why.
    """
    if getattr(current_process(), "_inheriting", False):
        os._exit(1)


@contextmanager
def watched_workers() -> Iterator[None]:
    """Raise OSError if a process that `datasets` starts dies."""
    multiprocess.pool.Pool, Workers.started = Workers, False
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError, multiprocess.TimeoutError) as error:
        other = isinstance(error, RuntimeError) and "abruptly died" not in str(error)  # which `datasets` says
        if other or not Workers.started:
            raise
        raise OSError(DIED) from None
    finally:
        multiprocess.pool.Pool = Workers.__base__


class Workers(multiprocess.pool.Pool):
    """A pool of processes whose tasks fail if a process dies.

    The pool of `multiprocess` starts a new process instead. That one waits for ever if the dead one held a lock, and
    so does the end of the pool.
    """

    started = False  # whether there has been a pool

    def _repopulate_pool(self) -> None:  # is called once, before anything starts new processes
        super()._repopulate_pool()
        Workers.started = True
        threading.Thread(target=self.watch, args=[list(self._pool)], daemon=True).start()

    def watch(self, workers: list[BaseProcess]) -> None:
        """Let every task fail from the death of a worker on, also those that are given later."""
        died = False
        while self._state != multiprocess.pool.TERMINATE:
            died = died or any(worker.exitcode is not None for worker in workers)
            for result in list(self._cache.values()) if died else []:
                with suppress(KeyError):  # it has come after all
                    result._set(0, (False, OSError(DIED)))
            time.sleep(TICK)

    def close(self) -> None:
        """Do nothing: `datasets` waits for the results first, and terminate ends the processes."""

    join = close

    def terminate(self) -> None:
        """End the processes and threads without waiting for a lock."""
        self._terminate.cancel()  # what would be done at the end of Python otherwise
        self._state = multiprocess.pool.TERMINATE
        for thread in (self._worker_handler, self._task_handler, self._result_handler):
            thread._state = multiprocess.pool.TERMINATE
        self._change_notifier.put(None)
        self._worker_handler.join()  # from here on, no process is started
        for worker in self._pool:
            worker.kill()
            worker.join()
        self._inqueue._reader.close()  # a thread that still writes there goes on to its end
