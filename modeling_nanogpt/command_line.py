"""What the commands of this package share: the parser of their flags.

Nothing here imports torch or transformers, which takes seconds: a command reads its flags before it imports them.
"""

import argparse
import difflib
import math
import os
from pathlib import Path
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """The arguments of `python -m MODULE`. Flags are never abbreviated; a mistake is one line and exit status 2.

    `instead` says for flags of nanoGPT that are missing here what to use instead.
    """

    def __init__(self, module: str, *, usage: str, description: str | None, instead: dict[str, str] | None = None):
        layout = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)  # noqa: E731
        command = f"python -m {module}"
        super().__init__(
            prog=command,
            usage=f"{command} {usage}",
            description=description,
            formatter_class=layout,
            allow_abbrev=False,
        )
        self.instead = instead or {}
        self.bounds: dict[str, tuple[float, float]] = {}  # flag -> least number, and what all numbers are below

    def add_path(self, name: str, **options) -> None:
        """An argument that may name a file or folder. A shell leaves the ~ of `--tokenizer=~/folder` as it is."""
        self.add_argument(name, type=os.path.expanduser, **options)

    def add_model(self) -> None:
        """The arguments that name a trained model: MODEL and --revision."""
        self.add_path("model", metavar="MODEL", help="folder or Hub id of the model")
        self.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")

    def add_number(
        self, flag: str, default: float, help: str, *, at_least: float = 0, below: float = math.inf
    ) -> None:
        """A flag whose value is a number between bounds, and a whole one if the default is whole."""
        kind, metavar = (int, "N") if isinstance(default, int) else (float, "X")
        self.add_argument(flag, metavar=metavar, type=kind, default=default, help=f"{help} (default: {default})")
        self.bounds[flag] = (at_least, below)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The values of all arguments. An unknown flag is answered with the nearest known one."""
        values, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self.explain_unknown(unknown[0]))
        for flag, (at_least, below) in self.bounds.items():
            value = getattr(values, flag.removeprefix("--"))
            if not value >= at_least:  # this way NaN fails as well
                self.error(f"{flag}={value}, but it must be at least {at_least}")
            if value == math.inf:
                self.error(f"{flag}={value}, but it must be finite")
            if not value < below:
                self.error(f"{flag}={value}, but it must be below {below}")
        model = getattr(values, "model", "")
        if model and values.revision and os.path.exists(model):
            self.error(f"--revision={values.revision} is for a Hub id, but {model} is on this machine")
        return values

    def read_text(self, flag: str, path: Path) -> str:
        """The text of the UTF-8 file that a flag names, every byte of it. A mistake ends the process."""
        try:
            return path.read_bytes().decode("utf-8")
        except OSError as error:
            self.error(f"{flag}: {path} cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            self.error(f"{flag}: {path} is not UTF-8 text (at byte {error.start})")

    def check_picture(self, flag: str, path: str) -> None:
        """End the process if no picture can be written to the path that a flag gives."""
        if os.path.splitext(path)[1] not in (".png", ".svg", ".pdf"):
            self.error(f"{flag}={path}, but it must be a .png, .svg or .pdf")
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            self.error(f"{flag}={path}: there is no such folder")

    def explain_unknown(self, word: str) -> str:
        """What to say about a word that is neither a flag nor an argument."""
        if not word.startswith("--"):
            return f"unexpected {word!r}: --help shows how the command is used"
        flag = word.split("=")[0]
        if flag in self.instead:
            return f"{flag} is a flag of nanoGPT: {self.instead[flag]}"
        (nearest,) = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0)
        return f"unknown flag {flag}: did you mean {nearest}? --help lists all of them"

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        if len(line) > 1000:  # it quotes very much
            line = f"{line[:500]} … {line[-500:]}"
        self.exit(2, f"{self.prog}: error: {line}\n")
