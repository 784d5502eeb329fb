"""Kill runs with SIGKILL at random moments and resume them until they are done: `make torture`.

A kill comes after a random time, or right before one of the operations by which a save writes, renames and removes
files, chosen at random. If a run has two processes, the kill takes one of them or both. In each case the resumed run
must end with the same weights as a run that nothing interrupted, and must have trained on the windows of each step
once.
"""

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, it finds `support` there

import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.training.checkpointing import list_checkpoints
from support.runs import (
    die_at_file_operation,
    finish,
    log_windows,
    read_windows,
    recipe_of,
    start,
    start_together,
)
from tokenization.windows import open_stream, training_windows

STEPS, WINDOWS, SEED = 12, 8, 1337
FLAGS = {"dropout": 0.2, "max_iters": STEPS, "eval_interval": 4, "log_interval": 5, "eval_tokens": 64, "seed": SEED}
FLAGS |= {"batch_size": 2, "gradient_accumulation_steps": 4}


@dataclasses.dataclass
class Row:
    """A run of the table. `strikes` says what each kill interrupted, `begun` at which steps the attempts began."""

    processes: int
    save_interval: int
    strikes: list[str]
    begun: list[int]
    equal: bool
    windows: bool


def attempt(folder: Path, processes: int, windows: Path, *flags: str, before: tuple = ()) -> list:
    """Start the run, or resume it if there is a checkpoint. The main process does what `before` says first."""
    out_dir = folder / "out"
    resumed = any((checkpoint / "state.json").exists() for checkpoint in list_checkpoints(out_dir))
    flags = (f"--out_dir={out_dir}", f"--init_from={'resume' if resumed else 'scratch'}", *flags)

    def first(rank):
        return ((log_windows, f"{windows}.{rank}"), *(before if rank == 0 else ()))

    recipe = folder.parent / "recipe.yaml"
    if processes == 1:
        return [start(recipe, folder / "log", *flags, before=first(0))]
    return start_together(processes, recipe, folder / "log", *flags, before=first)


def struck(out_dir: Path, begun: bool) -> str:
    """What a killed run was doing, judged by the files that it left."""
    if (out_dir / "checkpoints" / ".saving").exists():
        return "writing a checkpoint"
    if (out_dir / ".saving").exists():
        return "writing the model"
    if not all((folder / "state.json").exists() for folder in list_checkpoints(out_dir)):
        return "removing a checkpoint"
    return "training" if begun else "starting"


def kill_and_resume(folder: Path, processes: int, save_interval: int, kills: int, seconds: float, seed: int) -> Row:
    """One run, killed `kills` times. The uninterrupted run beside it took `seconds`."""
    rng, out_dir = random.Random(seed), folder / "out"
    flags = (f"--save_interval={save_interval}", f"--keep_checkpoints={rng.choice([1, 2])}")
    folder.mkdir()
    strikes, logs = [], []
    while len(strikes) < kills:
        logs.append(folder / f"windows-{len(logs)}")
        # an operation in one save or another: each has about 20, in a checkpoint or the model
        at_operation = rng.random() < 0.6
        before = ((die_at_file_operation, rng.randrange(1, 120), str(out_dir)),) if at_operation else ()
        running = attempt(folder, processes, logs[-1], *flags, before=before)
        if not at_operation:
            time.sleep(rng.uniform(0.1, 1) * seconds)
            for process in rng.choice([running, running[:1], running[-1:]]):
                process.kill()
        statuses = finish(*running)
        if -9 not in statuses:
            break  # the run ended before the kill
        strikes.append(struck(out_dir, Path(f"{logs[-1]}.0").exists()))
        if (out_dir / "model.safetensors").exists():
            NanoGPTForCausalLM.from_pretrained(out_dir)  # what is there must load
    logs.append(folder / f"windows-{len(logs)}")
    running = attempt(folder, processes, logs[-1], *flags)
    statuses = finish(*running)
    assert statuses == [0] * processes, (folder / ("log" if processes == 1 else "log.0")).read_text()
    begun, windows = trained_on(folder.parent / "data", logs, processes)
    equal = same_weights(out_dir, folder.parent / f"unbroken-{processes}" / "out")
    return Row(processes, save_interval, strikes, begun, equal, windows)


def same_weights(ours: Path, theirs: Path) -> bool:
    """Whether two models are equal, bit for bit."""
    ours, theirs = (load_file(out_dir / "model.safetensors") for out_dir in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trained_on(data_dir: Path, logs: list[Path], processes: int) -> tuple[list[int], bool]:
    """The steps at which the attempts began, and whether they trained on the windows of each step once.

    If an attempt was killed, only those of its steps count that the next attempt did not repeat.
    """
    stream, micro_batches = open_stream(str(data_dir), "train"), 4 // processes
    right = True
    for rank in range(processes):
        noted = [Path(f"{log}.{rank}") for log in logs]
        attempts = [read_windows(path) for path in noted if path.exists() and path.read_text().endswith("\n")]
        begun = [first for first, _ in attempts]
        seen = []
        for (first, batches), end in zip(attempts, [*begun[1:], STEPS], strict=True):
            seen += batches[: (end - first) * micro_batches]
        expected = []
        for step in range(STEPS):
            drawn = training_windows(stream, order="random", seed=SEED, step=step, count=WINDOWS, block_size=16)
            expected += [share.offsets.tolist() for share in drawn.shares(2, processes, rank)]
        right = right and seen == expected
    return begun, right


def unbroken(folder: Path, processes: int) -> float:
    """Run once without any kill; returns the seconds that it took."""
    aside = folder / f"unbroken-{processes}"
    aside.mkdir()
    started = time.monotonic()
    assert finish(*attempt(aside, processes, aside / "windows")) == [0] * processes, "the run fails by itself"
    return time.monotonic() - started


def main(runs: int, pairs: int, seed: int) -> bool:
    """Do so many runs with one process and with two, print the table, and say whether all went well."""
    rng = random.Random(seed)
    disable_progress_bar()
    print("run  processes  save_interval  attempts began at steps      weights  windows  killed while")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        recipe_of(folder, **FLAGS)
        unbroken(folder, 1)  # imports, and prepares the text
        (folder / "unbroken-1").rename(folder / "first")
        seconds = {processes: unbroken(folder, processes) for processes in (1, 2)}
        while len(rows) < runs + pairs:
            processes = 1 if len(rows) < runs else 2
            number = rng.randrange(2**32)
            row = kill_and_resume(
                folder / f"run-{number}",
                processes,
                save_interval=rng.choice([1, 1, 3]),
                kills=rng.randrange(1, 5),
                seconds=seconds[processes],
                seed=number,
            )
            if not row.strikes:
                continue  # none has hit
            rows.append(row)
            words = ("DIFFER", "equal"), ("WRONG", "right")
            print(
                f"{len(rows):3}  {row.processes:9}  {row.save_interval:13}  {', '.join(map(str, row.begun)):27}  "
                f"{words[0][row.equal]:7}  {words[1][row.windows]:7}  {', '.join(row.strikes)}",
                flush=True,
            )
    good = [row for row in rows if row.equal and row.windows]
    print(f"{len(good)} of {len(rows)} runs as if never killed; {sum(len(row.strikes) for row in rows)} kills")
    return len(good) == len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="of one process")
    parser.add_argument("--pairs", type=int, default=8, help="runs of two processes")
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(0 if main(**vars(parser.parse_args())) else 1)
