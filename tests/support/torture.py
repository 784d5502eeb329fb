"""Kill runs at random moments, and start them again by the same flags until they are done: `make torture`.

A round ends by SIGTERM, by SIGKILL, or by SIGTERM and a SIGKILL shortly after. The signal comes a random time after
the run has begun to start, to train, to evaluate, to sample, or to write the model or a checkpoint. Or SIGKILL comes
right before an operation by which a save writes, renames or removes a file. If a run has two processes, the signal
takes one of them or both. All rounds of a run have the same flags, among them --init_from=auto.

In each case the last round must end with the weights, the checkpoint, the log and the samples of a run that nothing
interrupted. The rounds must have trained on the windows of each step once, and a round that ended by SIGTERM alone
must not have lost a step.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, it finds `support` there

import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.training import saving
from modeling_nanogpt.training.checkpointing import newest_complete
from support.hub import Hub
from support.runs import (
    HOOKS,
    die_at_file_operation,
    finish,
    log_windows,
    read_windows,
    recipe_of,
    start,
    start_together,
)
from tokenization.windows import open_stream, training_windows

WINDOWS, MICRO_BATCHES, SEED = 8, 4, 1337  # windows and micro-batches in a step
FLAGS = {"dropout": 0.2, "eval_interval": 4, "log_interval": 5, "eval_tokens": 640, "seed": SEED}
FLAGS |= {"batch_size": WINDOWS // MICRO_BATCHES, "gradient_accumulation_steps": MICRO_BATCHES}
PHASES = ("starting", "training", "evaluating", "sampling", "writing the model", "writing a checkpoint")
SIGNALS = {"SIGTERM": [signal.SIGTERM], "SIGKILL": [signal.SIGKILL]}
SIGNALS["SIGTERM and SIGKILL"] = SIGNALS["SIGTERM"] + SIGNALS["SIGKILL"]


@dataclass
class Row:
    """What became of a run."""

    processes: int
    save_interval: int
    strikes: list[str]  # what ended each round before the last one
    lost_disks: int
    begun: list[int]  # the steps at which the rounds began, if they came so far
    redone: list[int]  # how many steps of each of these rounds were taken again
    faults: list[str]

    def __str__(self):
        cells = [self.processes, self.save_interval, len(self.strikes), self.lost_disks, self.begun[-1]]
        cells += [sum(self.redone)]
        return "  ".join(f"{cell:>13}" for cell in cells) + "  " + (", ".join(self.faults) or "as if never killed")


COLUMNS = ("processes", "save_interval", "strikes", "lost disks", "last begun at", "steps redone", "the run is")

# ---------------------------------------------------------------------------------------------------------------------
# In the run


def note_phases(path: str) -> None:
    """Keep in a file what this run does now."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)

    def note(phase: str) -> None:
        os.pwrite(descriptor, phase.ljust(24).encode(), 0)

    def noted(function, phase):
        def call(*arguments, **keywords):
            note(phase)
            result = function(*arguments, **keywords)
            note("training")
            return result

        return call

    HOOKS.before_step = noted(HOOKS.before_step, "training")
    HOOKS.before_evaluation = lambda step: note("evaluating")
    saving.draw_samples = noted(saving.draw_samples, "sampling")
    saving.save_checkpoint = noted(saving.save_checkpoint, "writing a checkpoint")
    saving.Saver._write_model = noted(saving.Saver._write_model, "writing the model")


# ---------------------------------------------------------------------------------------------------------------------
# Around the run


def begin(folder: Path, processes: int, notes: Path, *flags: str, before: tuple = ()) -> list:
    """Start a round. The main process does what `before` says first."""

    def first(rank):
        noting = (log_windows, f"{notes}.{rank}")
        return (noting, (note_phases, f"{notes}.phase"), *before) if rank == 0 else (noting,)

    recipe, flags = folder.parent / "recipe.yaml", (f"--out_dir={folder / 'out'}", "--init_from=auto", *flags)
    if processes == 1:
        return [start(recipe, folder / "log", *flags, before=first(0))]
    return start_together(processes, recipe, folder / "log", *flags, before=first)


def phase_of(notes: Path) -> str:
    """What a run does now."""
    path = Path(f"{notes}.phase")
    return (path.read_text() if path.exists() else "").strip() or "starting"


def strike(rng: random.Random, running: list, notes: Path) -> str:
    """Send a signal at a random moment, unless the run ends before. Returns the signal and what it interrupted."""
    kind, moment = rng.choice(list(SIGNALS)), rng.choice(PHASES)
    struck = rng.choice([running, running[:1], running[-1:]])
    delay = rng.choice([0, rng.uniform(0, 0.02), rng.uniform(0, 1)])
    while phase_of(notes) != moment and running[0].exitcode is None:
        time.sleep(0.0005)
    time.sleep(delay)
    phase = phase_of(notes)
    for number in SIGNALS[kind]:
        for process in struck:
            if process.exitcode is None:
                os.kill(process.pid, number)
        time.sleep(rng.uniform(0, 0.1))
    return f"{kind} while {phase}"


def run_in_rounds(
    folder: Path, processes: int, save_interval: int, steps: int, strikes: int, seed: int, cache: Path | None
) -> Row:
    """One run, which is struck so many times, unless it is done before.

    If there is a `cache`, which is the Hub client's, the run pushes its checkpoints, and loses its disk now and then.
    """
    rng, out_dir = random.Random(seed), folder / "out"
    flags = (f"--max_iters={steps}", f"--save_interval={save_interval}", f"--keep_checkpoints={rng.choice([1, 2])}")
    if cache:
        flags += ("--push_to_hub=true", "--hub_strategy=checkpoint", f"--hub_model_id=alice/{folder.name}")
    folder.mkdir()
    row = Row(processes, save_interval, strikes=[], lost_disks=0, begun=[], redone=[], faults=[])
    rounds: list[tuple[Path, bool]] = []  # the notes of each round that began to train, and whether it left by itself
    statuses = [1]
    while any(statuses):
        notes = folder / f"round-{len(row.strikes)}"
        if len(row.strikes) == strikes:
            running, what = begin(folder, processes, notes, *flags), ""
        elif rng.random() < 0.2:
            # an operation in one save or another: each has about 20, in a checkpoint or the model
            death = (die_at_file_operation, rng.randrange(1, 120), str(out_dir))
            running, what = begin(folder, processes, notes, *flags, before=(death,)), "SIGKILL before a file operation"
        else:
            running = begin(folder, processes, notes, *flags)
            what = strike(rng, running, notes)
        statuses = finish(*running)
        if any(statuses):
            log = (folder / ("log" if processes == 1 else "log.0")).read_text()
            assert what and (processes > 1 or "Traceback" not in log), log
            row.strikes.append(what)
        if read_round(f"{notes}.0"):
            rounds.append((notes, statuses == [128 + signal.SIGTERM] * processes))
        if (out_dir / "model.safetensors").exists():
            NanoGPTForCausalLM.from_pretrained(out_dir)  # what is there must load
        if cache and any(statuses) and rng.random() < 0.5:
            row.lost_disks += 1
            shutil.rmtree(out_dir, ignore_errors=True)
            shutil.rmtree(cache, ignore_errors=True)
    for rank in range(processes):
        seen = [read_round(f"{notes}.{rank}") for notes, _ in rounds]
        row.begun = [first for first, _ in seen]
        row.faults += faults_in_windows(folder.parent / "data", seen, steps, rank, processes)
        ends = [first + steps_taken(batches, processes) for first, batches in seen]
        row.redone = [max(end - begun, 0) for end, begun in zip(ends, [*row.begun[1:], steps], strict=True)]
    if any(redone and left for redone, (_, left) in zip(row.redone, rounds, strict=True)):
        row.faults.append("SIGTERM lost a step")
    row.faults += differences(out_dir, folder.parent / f"unbroken-{processes}" / "out")
    return row


def read_round(path: str) -> tuple[int, list] | None:
    """The step at which a round began to train, and the offsets of its micro-batches. None if it did not train."""
    text = Path(path).read_text() if Path(path).exists() else ""
    return read_windows(Path(path)) if text.endswith("\n") else None


def faults_in_windows(data_dir: Path, seen: list, steps: int, rank: int, processes: int) -> list[str]:
    """Whether each round trained on the windows of its steps, and the rounds together took all steps."""
    stream, share = open_stream(str(data_dir), "train"), MICRO_BATCHES // processes
    expected = []  # for each step, the offsets of this process's micro-batches
    for step in range(steps):
        drawn = training_windows(stream, order="random", seed=SEED, step=step, count=WINDOWS, block_size=16)
        shares = drawn.shares(WINDOWS // MICRO_BATCHES, processes, rank)
        expected.append([each.offsets.tolist() for each in shares])
    taken = set()
    for first, batches in seen:
        for step in range(first, first + steps_taken(batches, processes)):
            ours = batches[(step - first) * share :][:share]
            if ours != expected[step]:
                return [f"WITH OTHER WINDOWS IN STEP {step}"]
            taken.add(step)
    return [] if taken == set(range(steps)) else ["WITHOUT SOME STEPS"]


def steps_taken(batches: list, processes: int) -> int:
    """How many steps a round took. While the last micro-batch of a step trains, the next one is already there."""
    return (len(batches) - 1) // (MICRO_BATCHES // processes)


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two out_dirs, bit for bit."""
    found = []
    models = [load_file(out_dir / "model.safetensors") for out_dir in (ours, theirs)]
    if not same(*models):
        found.append("WITH OTHER WEIGHTS")
    folders = [newest_complete(out_dir) for out_dir in (ours, theirs)]
    if not same(*(torch.load(folder / "training_state.pt", weights_only=True) for folder in folders)):
        found.append("WITH ANOTHER CHECKPOINT")
    if without_speed(ours) != without_speed(theirs):
        found.append("WITH ANOTHER LOG")
    if (ours / "samples.jsonl").read_bytes() != (theirs / "samples.jsonl").read_bytes():
        found.append("WITH OTHER SAMPLES")
    return found


def same(one, other) -> bool:
    """Whether two nested dictionaries hold the same tensors and values."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return json.dumps(one) == json.dumps(other)  # a tuple comes back as a list


def without_speed(out_dir: Path) -> list[dict]:
    """The entries of the log, without how fast the run was."""
    entries = [json.loads(line) for line in (out_dir / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


def unbroken(folder: Path, processes: int, steps: int) -> None:
    """Run once without any strike."""
    aside = folder / f"unbroken-{processes}"
    aside.mkdir()
    running = begin(aside, processes, aside / "round", f"--max_iters={steps}")
    assert finish(*running) == [0] * processes, "the run fails by itself"


def main(runs: int, pairs: int, strikes: int, seed: int, hub: bool = False) -> bool:
    """Do so many runs with one process and with two, print what became of them, and say whether all went well."""
    rng, steps = random.Random(seed), 3 * strikes
    disable_progress_bar()
    print(f"seed {seed}, {steps} steps\n" + "  ".join(f"{column:>13}" for column in COLUMNS))
    rows = []
    with tempfile.TemporaryDirectory() as folder, Hub() as server:
        folder = Path(folder)
        if hub:
            os.environ.update(server.environment(folder / "home"))  # before the first process is forked
        recipe_of(folder, **FLAGS)
        for processes, count in ((1, runs), (2, pairs)):
            if count:
                unbroken(folder, processes, steps)
            for _ in range(count):
                number, save_interval = rng.randrange(2**32), rng.choice([1, 1, 3])
                cache = folder / "home" / "hub" if hub else None
                where = folder / f"run-{number}"
                row = run_in_rounds(where, processes, save_interval, steps, strikes, seed=number, cache=cache)
                if hub:
                    pushed = server.model(f"alice/{where.name}").files["model.safetensors"]
                    if pushed != (where / "out" / "model.safetensors").read_bytes():
                        row.faults.append("WITH OTHER WEIGHTS ON THE HUB")
                rows.append(row)
                print(row, flush=True)
    for what, count in sorted(Counter(each for row in rows for each in row.strikes).items()):
        print(f"{count:4}  {what}")
    good = sum(not row.faults for row in rows)
    print(f"{good} of {len(rows)} runs as if never killed; {sum(len(row.strikes) for row in rows)} strikes")
    return good == len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of one process")
    parser.add_argument("--pairs", type=int, default=2, help="runs of two processes")
    parser.add_argument("--strikes", type=int, default=20, help="signals to a run; it has three times as many steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--hub", action="store_true", help="push to a Hub on loopback, and lose the disk now and then")
    sys.exit(0 if main(**vars(parser.parse_args())) else 1)
