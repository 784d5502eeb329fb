"""Where a run starts: from scratch, from a model, or from where it stopped."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from .checkpointing import TrainState, list_checkpoints, newest_complete, read_checkpoint, read_tensors
from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import NanoGPTForCausalLM
from .pushing import fetch_run
from .sources import Source, check_given, choose_config, open_source


@dataclasses.dataclass
class Start:
    """The model's shape; its weights, where a model is gone on from; and how far the run has come.

    `resumed` is the checkpoint to go on from, `run` what it says of its run (recipe, config, data), and `superseded`
    the checkpoints in out_dir that this run makes void.
    """

    config: NanoGPTConfig
    model: NanoGPTForCausalLM | None = None
    state: TrainState = dataclasses.field(default_factory=TrainState)
    resumed: Path | None = None
    run: dict = dataclasses.field(default_factory=dict)
    superseded: list[Path] = dataclasses.field(default_factory=list)
    source: Source | None = None


def find_start(init_from: str, shape: dict, out_dir: Path, recipe: dict, shaping: Iterable[str]) -> Start:
    """What `init_from` means, given the keys of NanoGPTConfig in `shape` and the flags of the recipe.

    To resume where out_dir has no checkpoint, the run is fetched from hub_model_id, if the recipe has that.

    Raises ValueError where the source cannot be read or contradicts a flag (of those `shaping` what is learned, if a
    run is resumed), and where a new run would write over one that has not come to its end.
    """
    revision = recipe.get("revision")
    fetch_run(init_from, recipe.get("hub_model_id"), out_dir)
    folder = find_resumed(init_from, out_dir)
    if folder:
        state, run = read_checkpoint(folder)
        config = NanoGPTConfig(**run["config"])
        check_given(config, shape, init_from)
        check_same_run(folder, state.step, run, recipe, shaping)
        start = Start(config, state=state, resumed=folder, run=run)
    else:
        source = None
        if init_from != "scratch":
            try:
                source = open_source(init_from, revision)
            except ValueError as mistake:
                raise ValueError(f"init_from={mistake}") from None
        config = choose_config(shape, source)
        start = Start(config, source=source)
        if source is not None:
            try:
                start.model = source.model(config)
            except ValueError as mistake:
                raise ValueError(f"init_from={mistake}") from None
    start.superseded = superseded_by(out_dir, folder)
    if not (recipe["eval_only"] or recipe["prepare_only"]):  # which overwrite nothing
        check_unfinished(out_dir, folder)
    return start


def find_resumed(init_from: str, out_dir: Path) -> Path | None:
    """The checkpoint that `init_from` means, if it means one: `resume` is the newest complete one in out_dir.

    Raises ValueError where there is none, or the named one is not complete.
    """
    if init_from == "resume":
        folder = newest_complete(out_dir)
        if folder is None:
            raise ValueError(f"init_from=resume, but {out_dir}/checkpoints holds no complete checkpoint")
    else:
        folder = Path(init_from)
        if folder.parent.name != "checkpoints":
            return None
    try:
        read_checkpoint(folder)
        read_tensors(folder, mapped=True)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return folder


def is_within(resumed: Path | None, out_dir: Path) -> bool:
    """Whether a checkpoint to go on from is one of out_dir's own."""
    return resumed is not None and resumed.parent.resolve() == (out_dir / "checkpoints").resolve()


def check_unfinished(out_dir: Path, resumed: Path | None) -> None:
    """Raise ValueError where an out_dir holds a run that has not come to its end, which another would overwrite."""
    folder = newest_complete(out_dir)
    if folder is None or is_within(resumed, out_dir):
        return
    state, run = read_checkpoint(folder)
    if state.step < run["recipe"]["max_iters"]:
        raise ValueError(
            f"out_dir={out_dir} holds a run that stopped at step {state.step} of {run['recipe']['max_iters']}: "
            f"--init_from=resume goes on with it; else give another --out_dir, or remove {out_dir}/checkpoints"
        )


def superseded_by(out_dir: Path, resumed: Path | None) -> list[Path]:
    """The checkpoints in out_dir that a run makes void: those beyond where it goes on; all of them if it is new."""
    goes_on = is_within(resumed, out_dir)
    return [folder for folder in list_checkpoints(out_dir) if not goes_on or folder.name > resumed.name]


def check_same_run(folder: Path, step: int, run: dict, recipe: dict, shaping: Iterable[str]) -> None:
    """Raise ValueError where a recipe contradicts the one that a checkpoint was trained with, in a `shaping` flag.

    Batches may be cut another way, as long as a step sees as many windows; and a run may be made longer.
    """
    if recipe["max_iters"] < step:
        raise ValueError(f"max_iters={recipe['max_iters']}, but {folder} has seen {step} steps already")
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
