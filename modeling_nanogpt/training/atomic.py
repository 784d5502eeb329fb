"""Writing that a crash cannot spoil: everything is written aside, and counts only once it is renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


def check_writable(out_dir: Path, *below: Path) -> None:
    """Raise ValueError if out_dir, or a folder below it, cannot be written. Leaves no trace.

    If a folder is not there yet, its nearest parent must be such that the folder can be made.
    """
    for folder in (out_dir, *below):
        path = folder.absolute()
        nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))  # or a link to nowhere
        try:
            with suppress(FileNotFoundError):
                path.lstat()  # fails if the name is too long, for example
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            reason = error.strerror if folder == out_dir else f"{folder}: {error.strerror}"
            raise ValueError(f"out_dir={out_dir} cannot be written ({reason}): give another --out_dir") from None


@contextmanager
def files_written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into. On leaving, its files replace the files of the same names in `folder`.

    A crash before that leaves `folder` as it was. Each rename is atomic. The weights come last: if a folder has new
    weights, it also has everything that they need to load.
    """
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            open_to_others(path)
            flush(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into. On leaving, it becomes `folder`, so that `folder` is whole or not there."""
    staging = folder.with_name(".saving")  # always the same name: the next save clears away what a killed run left
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            flush(path)
        os.rename(staging, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_to_others(path: Path) -> None:
    """Give a file the permissions of an ordinary new file. safetensors writes files that only the owner may read."""
    umask = os.umask(0)  # only a call that sets the umask also returns it
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk. Only then may a rename make it count.

    Windows flushes a file only if it is open for writing, and does not open a folder at all. Some network file systems
    do not flush a folder, because they send each rename to the server at once.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
