"""Checkpoints, from which a run goes on as if it had never stopped.

A checkpoint is a folder `checkpoints/step-00002000` of out_dir. It is either complete or not there:

    training_state.pt   the tensors of the model, its average and the optimizer by name, gathered from all processes
    state.json          TrainState, the recipe, the model's shape, the data, and the size of training_state.pt in bytes

A checkpoint holds no random state: windows and dropout are drawn anew for each step, from the seed and the step.
"""

import copy
import dataclasses
import json
import math
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .atomic import folder_written_aside
from .averaging import Average

CHECKPOINTS = "checkpoints"  # in out_dir
TENSORS, STATE = "training_state.pt", "state.json"


@dataclasses.dataclass
class TrainState:
    """How far a run has come.

    `step` counts finished optimizer steps, `history` is the log so far, and `samples` has the first sample of each
    save. `stale` counts the evaluations since the one with the lowest validation loss. `losses` (nats a token) are
    those of the steps since the last entry of the log, with None for a skipped step. `nonfinite` counts the skipped
    steps in a row. `scaler` is the state of the loss scaler of float16.
    """

    step: int = 0
    best_val_loss: float = math.inf
    stale: int = 0
    history: list[dict] = dataclasses.field(default_factory=list)
    samples: list[dict] = dataclasses.field(default_factory=list)
    losses: list[float | None] = dataclasses.field(default_factory=list)
    nonfinite: int = 0
    scaler: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.best_val_loss is None:  # what to_json makes of infinity
            self.best_val_loss = math.inf

    def is_stale(self, patience: int) -> bool:
        """Whether the last `patience` evaluations did not lower the validation loss. Never with patience 0."""
        return 0 < patience <= self.stale


def gather_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> dict:
    """The weights, their average if there is one, and the optimizer's state by parameter name, whole and on the CPU.

    Every process takes part.

    The result does not depend on the number of processes, or on whether a process holds all of the model or a shard.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    tensors = {"model": weights, "optimizer": optimizer_state}
    if average.decay:
        with average.in_model():
            tensors["average"] = copy.deepcopy(get_model_state_dict(model, options=options))
    return tensors


def scatter_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average, tensors: dict) -> None:
    """Put back what gather_tensors returned. Only the main process gives the tensors, the others an empty dict."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=torch.distributed.is_initialized())
    if average.decay:
        set_model_state_dict(model, tensors.get("average", {}), options=options)
        average.begin_at_weights()
    set_model_state_dict(model, tensors.get("model", {}), options=options)
    set_optimizer_state_dict(model, optimizer, tensors.get("optimizer", {}), options=options)


def write_checkpoint(out_dir: Path, state: TrainState, tensors: dict, run: dict) -> None:
    """Write the checkpoint of a step. `run` says what the run is: its recipe, the model's shape, its data."""
    folder = out_dir / CHECKPOINTS / name_checkpoint(state.step)
    with folder_written_aside(folder) as staging:
        with open(staging / TENSORS, "wb") as file:
            torch.save(tensors, file)
        content = {"train_state": dataclasses.asdict(state), "run": run, "bytes": (staging / TENSORS).stat().st_size}
        (staging / STATE).write_text(to_json(content), encoding="utf-8")
        if folder.exists():
            remove_checkpoint(folder)


def to_json(value) -> str:
    """A value as JSON, in which null stands for a number that is not finite: JSON has no NaN and no infinity."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value):
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def name_checkpoint(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints in an out_dir, complete or not, the oldest first."""
    return in_order((out_dir / CHECKPOINTS).glob("step-*"))


def in_order(checkpoints: Iterable[Path]) -> list[Path]:
    """Checkpoints by their steps. A step beyond eight digits has a longer name."""
    return sorted(checkpoints, key=lambda path: (len(path.name), path.name))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. After a crash half-way, what is left does not look complete."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(folder: Path) -> tuple[TrainState, dict]:
    """The TrainState and the run of a checkpoint. Raises ValueError if the checkpoint is not complete."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        complete = (folder / TENSORS).stat().st_size == content["bytes"]
        state, run = TrainState(**content["train_state"]), content["run"]
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{folder} is not a complete checkpoint")
    return state, run


def newest_complete(out_dir: Path) -> Path | None:
    """The complete checkpoint of the latest step, or None if no checkpoint is complete."""
    for folder in reversed(list_checkpoints(out_dir)):
        try:
            read_checkpoint(folder)
        except ValueError:
            continue
        return folder
    return None


def read_tensors(folder: Path, mapped: bool) -> dict:
    """What gather_tensors returned, loaded or only mapped. Code that the file may hold is not run.

    Raises ValueError if the file is damaged or holds anything else.
    """
    try:
        return torch.load(folder / TENSORS, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ValueError(f"{folder / TENSORS} holds more than tensors, and code in it is not run") from None
    except (OSError, RuntimeError, EOFError, ValueError):
        raise ValueError(f"{folder / TENSORS} is damaged: name an older checkpoint by --init_from") from None


def restore(
    folder: Path,
    state: TrainState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    accelerator: Accelerator,
) -> None:
    """Put a checkpoint's tensors into the prepared model, its average and the optimizer.

    The loss scaler gets its state back, too.
    """
    mapped = accelerator.device.type != "cpu"  # on a CPU, the optimizer would go on with the mapped tensors themselves
    tensors = read_tensors(folder, mapped) if accelerator.is_main_process else {}
    scatter_tensors(model, optimizer, average, tensors)
    if accelerator.scaler and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)


def save_checkpoint(
    out_dir: Path, state: TrainState, tensors: dict, run: dict, *, keep: int, superseded: list[Path]
) -> None:
    """Write the checkpoint of a step. Then remove the superseded ones, and all complete ones but the newest `keep`."""
    write_checkpoint(out_dir, state, tensors, run)
    complete = []
    for folder in list_checkpoints(out_dir):
        if folder in superseded and folder.name != name_checkpoint(state.step):
            continue
        try:
            read_checkpoint(folder)
            complete.append(folder)
        except ValueError:
            pass
    for folder in set(list_checkpoints(out_dir)) - set(complete[-keep:]):
        remove_checkpoint(folder)
    superseded.clear()
