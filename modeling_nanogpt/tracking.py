"""Trackers, TensorBoard and the like: a picture of a run while it runs, and never a reason for it to stop."""

import sys
from collections.abc import Callable

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from tqdm import tqdm  # what it writes does not run into a bar


def choose_trackers(report_to: str) -> list[str]:
    """The names in a comma-separated list; raises ValueError where one is unknown or not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"report_to={name} is no tracker: none, or some of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise ValueError(f"report_to={name}: it is not installed here; leave it out, or install it")
    return list(dict.fromkeys(names))


class Trackers:
    """The trackers of a run, all that Accelerate knows; one that fails is left out, and a line on stderr says so."""

    def __init__(self, names: list[str], project: str, folder: str, recipe: dict):
        self._trackers = {}
        for name in names:
            self._survives(name, lambda: self._start(name, project, folder, recipe))  # noqa: B023, it is called at once

    def _start(self, name: str, project: str, folder: str, recipe: dict) -> None:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": folder} if tracker_class.requires_logging_directory else {}
        tracker = tracker_class(project, **where)
        tracker.start()
        tracker.store_init_configuration(recipe)
        self._trackers[name] = tracker

    def log(self, entry: dict) -> None:
        """Give an entry of the history to each."""
        values = {key: value for key, value in entry.items() if key != "step"}
        for name, tracker in list(self._trackers.items()):
            self._survives(name, lambda: tracker.log(values, step=entry["step"]))  # noqa: B023

    def finish(self) -> None:
        """Let each write what it still holds."""
        for name, tracker in list(self._trackers.items()):
            self._survives(name, tracker.finish)

    def _survives(self, name: str, call: Callable) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker may raise
            self._trackers.pop(name, None)
            reason = str(error).strip().split("\n")[0]
            tqdm.write(f"report_to={name} failed, and is left out from here on: {reason}", file=sys.stderr)
