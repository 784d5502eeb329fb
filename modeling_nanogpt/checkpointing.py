"""Saving that a crash cannot spoil, and the checkpoints from which a run goes on as if it had never stopped.

A checkpoint is a folder `checkpoints/step-00002000` of out_dir. It is written aside and renamed, so it is there whole
or not at all:

    training_state.pt   the model's and the optimizer's tensors under their names, gathered from all processes
    state.json          TrainState, the recipe, the model's shape, the data, and how many bytes training_state.pt has

No random state is in it: windows and dropout are drawn anew for each step, from the seed and the step.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

TENSORS, STATE = "training_state.pt", "state.json"


@dataclasses.dataclass
class TrainState:
    """How far a run has come.

    `step` counts finished optimizer steps, `history` is the log so far. `losses` (nats a token) has one for each step
    since its last entry, None where a step was skipped; `nonfinite` counts the skipped steps in a row. `scaler` is the
    state of float16's loss scaler.
    """

    step: int = 0
    best_val_loss: float = math.inf
    history: list[dict] = dataclasses.field(default_factory=list)
    losses: list[float | None] = dataclasses.field(default_factory=list)
    nonfinite: int = 0
    scaler: dict = dataclasses.field(default_factory=dict)


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
    try:
        yield staging
        for path in staging.iterdir():
            flush(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk: only then may a rename make them count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gather_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The weights and the optimizer's state by parameter names, whole, on the CPU; every process takes part.

    How many processes there are, and whether each holds all of the model or a shard, does not show in it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": optimizer_state}


def scatter_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict) -> None:
    """Put back what gather_tensors returned on the main process; the others give an empty dict for it."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=torch.distributed.is_initialized())
    set_model_state_dict(model, tensors.get("model", {}), options=options)
    set_optimizer_state_dict(model, optimizer, tensors.get("optimizer", {}), options=options)


def write_checkpoint(out_dir: Path, state: TrainState, tensors: dict, run: dict) -> None:
    """Write the checkpoint of a step. `run` is what the run is: its recipe, the model's shape, its data."""
    folder = out_dir / "checkpoints" / f"step-{state.step:08d}"
    staging = folder.with_name("." + folder.name)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with open(staging / TENSORS, "wb") as file:
            torch.save(tensors, file)
        content = {"train_state": dataclasses.asdict(state), "run": run, "bytes": (staging / TENSORS).stat().st_size}
        (staging / STATE).write_text(json.dumps(content))
        for path in (staging / TENSORS, staging / STATE, staging):
            flush(path)
        if folder.exists():
            remove_checkpoint(folder)
        os.rename(staging, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints in an out_dir, complete or not, the oldest first."""
    return sorted((out_dir / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name))


def remove_checkpoint(folder: Path) -> None:
    """Remove one, so that a crash half-way leaves none that seems complete."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(folder: Path) -> tuple[TrainState, dict]:
    """The TrainState and the run of a checkpoint; raises ValueError where it is not complete."""
    try:
        content = json.loads((folder / STATE).read_text())
        complete = (folder / TENSORS).stat().st_size == content["bytes"]
        state, run = TrainState(**content["train_state"]), content["run"]
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{folder} is no complete checkpoint")
    return state, run


def newest_complete(out_dir: Path) -> Path | None:
    """The checkpoint of the latest step that is complete, or None without any."""
    for folder in reversed(list_checkpoints(out_dir)):
        try:
            read_checkpoint(folder)
        except ValueError:
            continue
        return folder
    return None


def restore(
    folder: Path, state: TrainState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Put a checkpoint's tensors into the prepared model and optimizer, and its loss scaler's state into ours.

    The tensors are mapped rather than loaded, and no code that the file may hold is run.
    """
    tensors = {}
    if accelerator.is_main_process:
        tensors = torch.load(folder / TENSORS, map_location="cpu", weights_only=True, mmap=True)
    scatter_tensors(model, optimizer, tensors)
    if accelerator.scaler and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)


def save_checkpoint(
    out_dir: Path, state: TrainState, tensors: dict, run: dict, keep: int, superseded: list[Path]
) -> None:
    """Write the checkpoint of a step, then remove all complete ones but the newest `keep`, and those `superseded`."""
    write_checkpoint(out_dir, state, tensors, run)
    complete = []
    for folder in list_checkpoints(out_dir):
        if folder not in superseded or folder.name == f"step-{state.step:08d}":
            try:
                read_checkpoint(folder)
                complete.append(folder)
            except ValueError:
                pass
    for folder in set(list_checkpoints(out_dir)) - set(complete[-keep:]):
        remove_checkpoint(folder)
    superseded.clear()


def find_resumed(init_from: str, out_dir: Path) -> Path | None:
    """The checkpoint that `init_from` means, if it means one: `resume` is the newest complete one in out_dir.

    Raises ValueError where there is none, or the named one is not complete.
    """
    if init_from == "resume":
        folder = newest_complete(out_dir)
        if folder is None:
            raise ValueError(f"init_from=resume, but {out_dir}/checkpoints holds no complete checkpoint")
        return folder
    folder = Path(init_from)
    if folder.parent.name != "checkpoints":
        return None
    try:
        read_checkpoint(folder)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return folder


def check_unfinished(out_dir: Path) -> None:
    """Raise ValueError where an out_dir holds a run that has not come to its end, which a new one would overwrite."""
    folder = newest_complete(out_dir)
    if folder is None:
        return
    state, run = read_checkpoint(folder)
    if state.step < run["recipe"]["max_iters"]:
        raise ValueError(
            f"out_dir={out_dir} holds a run that stopped at step {state.step} of {run['recipe']['max_iters']}: "
            f"--init_from=resume goes on with it; else give another --out_dir, or remove {out_dir}/checkpoints"
        )


def superseded_by(out_dir: Path, resumed: Path | None) -> list[Path]:
    """The checkpoints in out_dir that a run makes void: those beyond where it goes on; all of them if it is new."""
    return [folder for folder in list_checkpoints(out_dir) if resumed is None or folder.name > resumed.name]


def check_same_run(folder: Path, run: dict, recipe: dict, shaping: Iterable[str]) -> None:
    """Raise ValueError where a recipe contradicts the one that a checkpoint was trained with, in a `shaping` flag.

    Batches may be cut another way, as long as a step sees as many windows.
    """
    windows = [flags["batch_size"] * flags["gradient_accumulation_steps"] for flags in (recipe, run["recipe"])]
    if windows[0] != windows[1]:
        raise ValueError(
            f"batch_size * gradient_accumulation_steps is {windows[0]}, but {folder} was trained with {windows[1]}"
        )
    for key in shaping:
        ours, theirs = recipe[key], run["recipe"].get(key)
        if ours != theirs:
            raise ValueError(
                f"{key}={ours}, but {folder} was trained with {theirs}: go on with --{key}={theirs}, or begin a run "
                "in another --out_dir"
            )


class Saves:
    """Saves that may fail: training goes on, and the next one makes up for it. `failed` says what has not."""

    def __init__(self):
        self._failures = {}

    @property
    def failed(self) -> str:
        return "; ".join(f"{what} could not be saved ({reason})" for what, reason in self._failures.items())

    def attempt(self, what: str, save: Callable, *args) -> None:
        """Call save(*args); where the disk refuses, a line on stderr says so."""
        try:
            save(*args)
            self._failures.pop(what, None)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is how torch says that a disk is full
            self._failures[what] = str(error).strip().split("\n")[0]
            print(f"{what} could not be saved ({self._failures[what]}): the next save tries again", file=sys.stderr)
