"""Saving that a crash cannot spoil: files are written aside and renamed when all of them are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(folder: str) -> None:
    """Raise ValueError where a folder, or the nearest parent that is there, cannot be written; leaves no trace."""
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"out_dir={folder} cannot be written ({error.strerror}): give another --out_dir") from None


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; on leaving, its files replace those of the same names in `folder`.

    A crash before that leaves `folder` as it was. The renames themselves are atomic one by one, and a model's weights
    are one of the files, so whatever stands in `folder` loads.
    """
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for path in staging.iterdir():
        os.replace(path, folder / path.name)
    staging.rmdir()
