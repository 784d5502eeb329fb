"""Where a run starts: from scratch, from the checkpoint of a run that stopped, or from a trained model."""

import dataclasses
from pathlib import Path

from ..configuration_nanogpt import NanoGPTConfig
from ..sources import Source, check_given, choose_config, open_source
from .checkpointing import CHECKPOINTS, TrainState, list_checkpoints, newest_complete, read_checkpoint, read_tensors

# Flags that shape what is learned. A resumed run must have the same ones.
SHAPING = (
    *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "lr_schedule", "decay_fraction"),
    *("optimizer", "weight_decay", "beta1", "beta2", "momentum", "grad_clip", "seed", "windows"),
)


@dataclasses.dataclass
class Start:
    """Where a run starts: the model's shape, and either nothing more, or a checkpoint, or a source of weights.

    `run` is what the checkpoint says about its run: recipe, config and data.
    """

    config: NanoGPTConfig
    source: Source | None = None
    checkpoint: Path | None = None
    state: TrainState = dataclasses.field(default_factory=TrainState)
    run: dict = dataclasses.field(default_factory=dict)


def start_from_scratch(shape: dict) -> Start:
    """A new model. `shape` holds the keys of NanoGPTConfig that the flags give."""
    return Start(choose_config(shape))


def start_from_checkpoint(folder: Path, shape: dict, recipe: dict) -> Start:
    """A run that stopped. Raises ValueError if a flag contradicts the run."""
    state, run = read_checkpoint(folder)
    config = NanoGPTConfig(**run["config"])
    check_given(config, shape, str(folder))
    check_same_run(folder, state.step, run, recipe)
    return Start(config, checkpoint=folder, state=state, run=run)


def start_from_model(init_from: str, revision: str | None, shape: dict) -> Start:
    """A trained model: a folder, a Hub id or nanoGPT's ckpt.pt. Raises ValueError if it cannot be read."""
    try:
        source = open_source(init_from, revision)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return Start(choose_config(shape, source), source=source)


def find_checkpoint(init_from: str, out_dir: Path) -> Path | None:
    """The checkpoint that init_from means, or None if it means something else.

    `resume` means the newest complete checkpoint in out_dir. Raises ValueError if there is none, or if the named
    checkpoint is not complete.
    """
    if init_from == "resume":
        folder = newest_complete(out_dir)
        if folder is None:
            raise ValueError(f"init_from=resume, but {out_dir}/{CHECKPOINTS} holds no complete checkpoint")
    else:
        folder = Path(init_from)
        if folder.parent.name != CHECKPOINTS:
            return None
    try:
        read_checkpoint(folder)
        read_tensors(folder, mapped=True)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What contradicts a start


def check_same_run(folder: Path, step: int, run: dict, recipe: dict) -> None:
    """Raise ValueError if the recipe differs from the checkpoint's in a flag that shapes what is learned.

    The batches may be cut in another way, if a step sees the same number of windows. A run may be made longer.
    """
    if recipe["max_iters"] < step:
        raise ValueError(
            f"max_iters={recipe['max_iters']}, but {folder} has already taken {step} steps: raise --max_iters"
        )
    ours, theirs = (flags["batch_size"] * flags["gradient_accumulation_steps"] for flags in (recipe, run["recipe"]))
    if ours != theirs:
        raise ValueError(
            f"batch_size * gradient_accumulation_steps is {ours}, but {folder} was trained with {theirs}: change one "
            "of the two flags"
        )
    for key in SHAPING:
        ours, theirs = recipe[key], run["recipe"].get(key)
        if ours != theirs:
            raise ValueError(
                f"{key}={ours}, but {folder} was trained with {theirs}: go on with --{key}={theirs}, or begin a run "
                "in another --out_dir"
            )


def check_same_data(start: Start, data: dict, data_dir: str) -> None:
    """Raise ValueError if a run that goes on would see other data: `data` has the sha256, vocab_size and tokens."""
    if start.checkpoint and start.run["data"] != data:
        raise ValueError(
            f"data_dir={data_dir} holds other data than {start.checkpoint} was trained on: give that --data_dir, or "
            "begin a run in another --out_dir"
        )


def check_vocabulary(start: Start, tokens: int, data_dir: str, init_from: str) -> None:
    """Raise ValueError if the data has more tokens than the model that training goes on from."""
    if start.source and tokens > start.config.vocab_size:
        raise ValueError(
            f"data_dir={data_dir} has {tokens} tokens, but init_from={init_from} has {start.config.vocab_size}: "
            f"prepare another --data_dir with --tokenizer={init_from}"
        )


def check_unfinished(out_dir: Path, checkpoint: Path | None) -> None:
    """Raise ValueError if out_dir holds a run that has not come to its end, and this run would overwrite it."""
    folder = newest_complete(out_dir)
    if folder is None or is_within(checkpoint, out_dir):
        return
    state, run = read_checkpoint(folder)
    if state.step < run["recipe"]["max_iters"]:
        raise ValueError(
            f"out_dir={out_dir} holds a run that stopped at step {state.step} of {run['recipe']['max_iters']}: "
            f"--init_from=resume goes on with it; or give another --out_dir, or remove {out_dir}/{CHECKPOINTS}"
        )


def superseded_by(out_dir: Path, checkpoint: Path | None) -> list[Path]:
    """The checkpoints in out_dir that this run makes void: those after the one it goes on from, or all of them."""
    if not is_within(checkpoint, out_dir):
        return list_checkpoints(out_dir)
    return [folder for folder in list_checkpoints(out_dir) if folder.name > checkpoint.name]


def is_within(checkpoint: Path | None, out_dir: Path) -> bool:
    """Whether a checkpoint is one of out_dir's own."""
    return checkpoint is not None and checkpoint.parent.resolve() == (out_dir / CHECKPOINTS).resolve()
