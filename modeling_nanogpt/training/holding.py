"""One out_dir, one run: a lock that the system takes back when the process ends, however it ends."""

from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout

LOCK = ".lock"  # in out_dir
HELD: dict[Path, FileLock] = {}  # by this process


def hold(out_dir: Path) -> None:
    """Keep other runs out of out_dir. Raises ValueError if another run is at work there.

    Only the main process of a run holds it. A process may hold it again: after an error, a notebook starts anew.
    """
    if not PartialState().is_main_process:
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = HELD.setdefault(out_dir.resolve(), FileLock(out_dir / LOCK, timeout=0, thread_local=False))
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"out_dir={out_dir}: another run is at work there: wait until it has ended, or give another --out_dir"
        ) from None
    except (NotImplementedError, OSError):
        pass  # this file system has no locks, so nothing can be held


def let_go(out_dir: Path) -> None:
    """Let other runs into out_dir, if this process holds it."""
    if lock := HELD.pop(out_dir.resolve(), None):
        lock.release(force=True)


def check_free(out_dir: Path) -> None:
    """Raise ValueError if another run is at work in out_dir. Leaves no trace."""
    if (out_dir / LOCK).exists() and out_dir.resolve() not in HELD:
        hold(out_dir)
        let_go(out_dir)
