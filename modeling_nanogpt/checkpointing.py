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
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
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
from tqdm import tqdm  # what it writes does not run into a bar
from transformers import PreTrainedModel

from .modeling_nanogpt import NanoGPTForCausalLM

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

    A crash before that leaves `folder` as it was. The renames themselves are atomic one by one, and a model's weights,
    which are one of the files, come last: where there are weights, there is all that they need to load.
    """
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
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


def save_gathered(folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Save weights gathered from all processes as `model` saved its own, had training not changed its class.

    FSDP2 makes it one of its own, whose code would be saved, and unties its weights, which would be saved twice.
    """
    with torch.device("meta"):
        plain = NanoGPTForCausalLM(model.config)
    plain.generation_config = model.generation_config
    tied = plain.all_tied_weights_keys
    plain.save_pretrained(folder, state_dict={name: each for name, each in weights.items() if name not in tied})


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
    staging = folder.with_name(".saving")  # one name: what a killed run left there, the next save clears away
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


def read_tensors(folder: Path, mapped: bool) -> dict:
    """What gather_tensors returned, loaded or only mapped; no code that the file may hold is run.

    Raises ValueError where the file is another one.
    """
    try:
        return torch.load(folder / TENSORS, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ValueError(f"{folder / TENSORS} holds more than tensors, and code in it is not run") from None
    except (OSError, RuntimeError, EOFError, ValueError):
        raise ValueError(f"{folder / TENSORS} is damaged: name an older checkpoint by --init_from") from None


def restore(
    folder: Path, state: TrainState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Put a checkpoint's tensors into the prepared model and optimizer, and its loss scaler's state into ours."""
    mapped = accelerator.device.type != "cpu"  # there the optimizer would go on with these very tensors
    scatter_tensors(model, optimizer, read_tensors(folder, mapped) if accelerator.is_main_process else {})
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
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = self._failures[what] = str(cause).strip().split("\n")[0]
            tqdm.write(f"{what} could not be saved ({reason}): the next save tries again", file=sys.stderr)
