"""Where a run starts: from scratch, from the checkpoint of a run that stopped, or from a trained model."""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..configuration_nanogpt import NanoGPTConfig
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..sources import check_given, choose_config, open_source
from .atomic import check_writable
from .checkpointing import (
    CHECKPOINTS,
    STATE,
    TrainState,
    list_checkpoints,
    newest_complete,
    read_checkpoint,
    read_tensors,
)
from .holding import check_free
from .hub import NoRun, fetch_run

# flags that are keys of NanoGPTConfig
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "activation_function")
# Flags that shape what is learned. A resumed run must have the same ones.
SHAPING = (
    *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "lr_schedule", "decay_fraction"),
    *("optimizer", "weight_decay", "muon_weight_decay", "beta1", "beta2", "grad_clip", "seed", "windows"),
    *("momentum", "momentum_warmup_iters", "momentum_cooldown_iters", "average_decay"),
)


@dataclasses.dataclass
class Start:
    """Where a run starts: the model's shape, and what there is already of the model or of the run.

    `model` is a trained model, and `carries_tokenizer` says whether its tokenizer is with it. `checkpoint` is the
    folder from which a stopped run goes on, `state` how far it has come, and `run` its recipe, config and data.
    """

    config: NanoGPTConfig
    model: NanoGPTForCausalLM | None = None
    carries_tokenizer: bool = False
    checkpoint: Path | None = None
    state: TrainState = dataclasses.field(default_factory=TrainState)
    run: dict = dataclasses.field(default_factory=dict)


def choose_start(recipe: dict, out_dir: Path) -> str:
    """What a run starts from: `scratch`, `resume`, or the name of a model or checkpoint.

    `auto` becomes `resume` if out_dir holds a complete checkpoint, or if the run has pushed one to the Hub. Otherwise
    `auto` becomes what start_from names. Fetches a run from the Hub if out_dir has no checkpoint. Raises ValueError if
    the run cannot be fetched.
    """
    init_from, model_id = recipe["init_from"], recipe.get("hub_model_id")
    if init_from not in ("auto", "resume"):
        return init_from
    try:
        if model_id:
            fetch_run(model_id, out_dir)  # if out_dir has no checkpoint yet
    except NoRun:
        if init_from == "resume":
            raise
    if init_from == "resume" or newest_complete(out_dir):
        return "resume"
    recipe["init_from"] = recipe["start_from"]
    return recipe["start_from"]


def start_from_scratch(recipe: dict) -> Start:
    """A new model, of the shape that the flags give."""
    return Start(choose_config(given_shape(recipe), None))


def start_from_checkpoint(folder: Path, recipe: dict) -> Start:
    """A run that stopped. Raises ValueError if a flag contradicts the run.

    run.yaml repeats a run from its beginning, so `recipe` gets back what the model of the run came from.
    """
    state, run = read_checkpoint(folder)
    # an earlier version of the project wrote checkpoints without these flags
    earlier = {"momentum_warmup_iters": 0, "momentum_cooldown_iters": 0, "average_decay": 0.0}
    run["recipe"] = earlier | {"muon_weight_decay": run["recipe"]["weight_decay"]} | run["recipe"]
    config = NanoGPTConfig(**run["config"])
    check_given(config, given_shape(recipe), recipe["init_from"])
    check_same_run(folder, state.step, run, recipe)
    recipe |= {key: value for key, value in run["recipe"].items() if key in (*SHAPE, "init_from", "revision")}
    return Start(config, checkpoint=folder, state=state, run=run)


def start_from_model(init_from: str, revision: str | None, recipe: dict) -> Start:
    """A trained model: a folder, a Hub id or nanoGPT's ckpt.pt. Raises ValueError if it cannot be read."""
    try:
        source = open_source(init_from, revision, given_shape(recipe).get("n_head"))
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    config = choose_config(given_shape(recipe), source)
    try:
        model = source.model(config)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return Start(config, model=model, carries_tokenizer=source.carries_tokenizer)


def given_shape(recipe: dict) -> dict:
    """The keys of NanoGPTConfig that a recipe gives."""
    return {key: recipe[key] for key in SHAPE if recipe.get(key) is not None}


def find_checkpoint(init_from: str, out_dir: Path) -> Path | None:
    """The checkpoint that init_from means, or None if it means something else.

    `resume` means the newest complete checkpoint in out_dir. A folder is a checkpoint if it holds a checkpoint's
    state.json, or if its name is a checkpoint's: models may lie in a folder called checkpoints, too. Raises ValueError
    if there is no checkpoint to resume, or if the named one is not complete.
    """
    if init_from == "resume":
        folder = newest_complete(out_dir)
        if folder is None:
            raise ValueError(
                f"init_from=resume, but {out_dir}/{CHECKPOINTS} holds no complete checkpoint: give the --out_dir of a "
                "run that stopped, or begin one with --init_from=scratch"
            )
    else:
        folder = Path(init_from)
        named_so = folder.parent.name == CHECKPOINTS and re.fullmatch(r"step-\d+", folder.name)
        if not named_so and not os.path.isfile(folder / STATE):  # Path raises an error if a name is too long
            return None
    try:
        read_checkpoint(folder)
        read_tensors(folder, mapped=True)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What contradicts a start


def check_same_run(folder: Path, step: int, run: dict, recipe: dict, shaping: Iterable[str] = SHAPING) -> None:
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
    for key in shaping:
        ours, theirs = recipe[key], run["recipe"].get(key)
        if ours != theirs:
            raise ValueError(
                f"{key}={ours}, but {folder} was trained with {theirs}: go on with --{key}={theirs}, or begin a run "
                "in another --out_dir"
            )


def check_data(start: Start, record: dict, data_dir: Path) -> None:
    """Raise ValueError if the data does not fit the run or the model. `record` is the data's prepared.json."""
    if start.checkpoint and start.run["data"] != identify_data(record):
        raise ValueError(
            f"data_dir={data_dir} holds other data than {start.checkpoint} was trained on: give that --data_dir, or "
            "begin a run in another --out_dir"
        )
    tokens, known = record["vocab_size"], start.config.vocab_size
    if start.model and tokens > known:
        raise ValueError(
            f"data_dir={data_dir} has {tokens} tokens, but the model of init_from has {known}: give a --data_dir that "
            "was prepared with the tokenizer of that model"
        )


def identify_data(record: dict) -> dict:
    """The part of a data_dir's prepared.json that makes two data_dirs the same data."""
    return {key: record[key] for key in ("sha256", "vocab_size", "tokens")}


def check_out_dir(out_dir: Path, checkpoint: Path | None, overwrites: bool) -> None:
    """Raise ValueError if out_dir cannot be written, or if this run would overwrite one that has not come to its end.

    `checkpoint` is what this run goes on from, if anything.
    """
    check_writable(out_dir, out_dir / CHECKPOINTS)  # where saving will write
    if overwrites:
        check_free(out_dir)
    folder = newest_complete(out_dir)
    if not overwrites or folder is None or is_within(checkpoint, out_dir):
        return
    state, run = read_checkpoint(folder)
    if state.step < run["recipe"]["max_iters"]:
        raise ValueError(
            f"out_dir={out_dir} holds a run that stopped at step {state.step} of {run['recipe']['max_iters']}: "
            f"--init_from=resume goes on with it; or give another --out_dir, or remove {out_dir}/{CHECKPOINTS}"
        )


def superseded_by(out_dir: Path, checkpoint: Path | None) -> list[Path]:
    """The checkpoints in out_dir that this run removes: those after the one it goes on from, or all of them."""
    if checkpoint is None or not is_within(checkpoint, out_dir):
        return list_checkpoints(out_dir)
    return [folder for folder in list_checkpoints(out_dir) if folder.name > checkpoint.name]


def is_within(checkpoint: Path | None, out_dir: Path) -> bool:
    """Whether a checkpoint is one of out_dir's own."""
    return checkpoint is not None and checkpoint.parent.resolve() == (out_dir / CHECKPOINTS).resolve()
