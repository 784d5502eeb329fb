"""What a person sees of a run while it runs: a bar, and lines above it."""

import math
import sys

from accelerate import Accelerator
from accelerate.utils import tqdm


class Progress:
    """A bar over optimizer steps, on the main process alone; without `visible`, only its lines are shown."""

    def __init__(self, accelerator: Accelerator, first: int, total: int, visible: bool):
        rhythm = 0.5 if sys.stderr.isatty() else 10  # seconds between redraws: few in a log file
        self._speaks = accelerator.is_main_process
        self._bar = tqdm(initial=first, total=total, unit="step", mininterval=rhythm, disable=not visible)
        self.update, self.close = self._bar.update, self._bar.close

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._speaks:
            self._bar.write(line)
            sys.stdout.flush()  # a killed run has its lines in the log file

    def show(self, entry: dict) -> None:
        """Put an entry of the history beside the bar; it shows when the bar is drawn next."""
        parts = [
            f"loss {entry.get('loss', math.nan):.4f}",
            f"lr {entry['lr']:.2e}",
            f"{entry['tokens_per_second']:,.0f} tok/s",
        ]
        parts += [f"mfu {entry['mfu']:.1%}"] if "mfu" in entry else []
        parts += [f"{entry['skipped']} skipped"] if "skipped" in entry else []
        parts += [f"scale {entry['loss_scale']:g}"] if "loss_scale" in entry else []
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
