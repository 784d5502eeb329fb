"""What a person sees of a run while it runs: a bar, lines above it, and trackers such as TensorBoard."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from accelerate.utils import tqdm as tqdm_of_main_process
from tqdm import tqdm  # what tqdm writes does not run into a bar

from ..sources import first_line
from ..throughput import peak_flops
from .checkpointing import TrainState
from .describing import RunFacts


class Clock:
    """Measures the time of training alone: evaluating and saving happen while it is paused."""

    def __init__(self, step: int):
        self._step, self._since = step, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def rate(self, step: int) -> float:
        """Optimizer steps a second since the last call, up to this step."""
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._since)
        self._step, self._since = step, now
        return rate


class Log:
    """The one place that takes evaluations and entries: into the history, onto the screen, to the trackers.

    `trackers` are names of trackers. Only the main process speaks.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trackers: list[str],
        facts: RunFacts,
        state: TrainState,
        bar_visible: bool = True,
    ):
        self._state, self._facts = state, facts
        self._speaks = accelerator.is_main_process
        peak = peak_flops(accelerator.device)
        self._peak_flops = peak * accelerator.num_processes if peak else None  # of all devices, FLOPs a second
        self._trackers = Trackers(
            trackers if self._speaks else [],
            project=facts.out_dir.name,
            folder=str(facts.out_dir / "runs"),
            recipe=facts.recipe,
        )
        self._bar = tqdm_of_main_process(
            initial=state.step,
            total=facts.recipe["max_iters"],
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds: a log file should hold few drawings of the bar
            disable=not bar_visible,
        )

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        for line in lines if self._speaks else ():
            self._bar.write(line)
            sys.stdout.flush()  # so that the log file of a killed run holds the line

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.update()

    def evaluation(self, *, train_loss: float, val_loss: float) -> bool:
        """Take the losses (nats a token) of an evaluation. Returns whether val_loss is the lowest so far."""
        state = self._state
        self._record({"step": state.step, "eval_train_loss": train_loss, "val_loss": val_loss})
        self.say(f"step {state.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if not math.isfinite(val_loss):
            self.say(f"step {state.step}: training has diverged; a lower --learning_rate or --grad_clip=1 may help")
        improved = val_loss < state.best_val_loss  # NaN never is
        state.stale += 1
        if improved:
            state.best_val_loss, state.stale = val_loss, 0
        return improved

    def entry(self, summary: dict, *, lr: float, steps_per_second: float) -> None:
        """Take the summary of the steps since the last entry, and show it beside the bar."""
        entry = summary | {"lr": lr, "tokens_per_second": steps_per_second * self._facts.step_tokens}
        if self._peak_flops:
            entry["mfu"] = steps_per_second * self._facts.step_flops / self._peak_flops
        self._record(entry)
        self._bar.set_postfix_str(describe_entry(entry), refresh=False)  # shown when the bar is drawn next

    def _record(self, entry: dict) -> None:
        self._state.history.append(entry)
        self._trackers.log(entry)

    def close(self) -> None:
        self._bar.close()
        self._trackers.finish()


def describe_entry(entry: dict) -> str:
    """An entry of the log, in the few words that fit beside the bar."""
    parts = [f"loss {entry.get('loss', math.nan):.4f}", f"lr {entry['lr']:.2e}"]
    parts.append(f"{entry['tokens_per_second']:,.0f} tok/s")
    if "mfu" in entry:
        parts.append(f"mfu {entry['mfu']:.1%}")
    if "skipped" in entry:
        parts.append(f"{entry['skipped']} skipped")
    if "loss_scale" in entry:
        parts.append(f"scale {entry['loss_scale']:g}")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Trackers never stop a run


def choose_trackers(report_to: str) -> list[str]:
    """The names in a comma-separated list. Raises ValueError if a tracker is unknown or not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"report_to={name}, but it must be none, or trackers out of {known}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise ValueError(
                f"report_to={name}, but {name} is not installed: pip install {name}, or leave it out of --report_to"
            )
    return list(dict.fromkeys(names))


class Trackers:
    """The trackers of a run, any that Accelerate knows. If a tracker fails, it is dropped, and a line says so.

    `project` and `folder` are where the trackers keep the run, `recipe` its flags.
    """

    def __init__(self, names: list[str], *, project: str, folder: str, recipe: dict):
        self._trackers: dict = {}
        for name in names:
            self._survives(name, self._start, name, project, folder, recipe)

    def _start(self, name: str, project: str, folder: str, recipe: dict) -> None:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        options = {"logging_dir": folder} if tracker_class.requires_logging_directory else {}
        tracker = tracker_class(project, **options)
        tracker.start()
        tracker.store_init_configuration(recipe)
        self._trackers[name] = tracker

    def log(self, entry: dict) -> None:
        """Give an entry of the history to each tracker."""
        values = {key: value for key, value in entry.items() if key != "step"}
        for name, tracker in list(self._trackers.items()):
            self._survives(name, tracker.log, values, step=entry["step"])

    def finish(self) -> None:
        """Let each tracker write what it still holds."""
        for name, tracker in list(self._trackers.items()):
            self._survives(name, tracker.finish)

    def _survives(self, name: str, call: Callable, *args, **kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # a tracker may raise anything
            self._trackers.pop(name, None)
            tqdm.write(f"report_to={name} failed, and is left out from here on: {first_line(error)}", file=sys.stderr)
