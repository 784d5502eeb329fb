"""The flags that name the data, and the parser that all flags of the project go through.

Nothing here imports torch or transformers, which takes seconds: `--help` and a mistyped flag are answered at once.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from .nanogpt_flags import INSTEAD

TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def knob(
    default: Any, help: str, *, at_least: float = 0, below: float = math.inf, heading: str = "", path: bool = False
) -> Any:
    """A flag as a field of a dataclass: its default, what `--help` says, and the bounds of a number.

    A number must be at least `at_least` and less than `below`. A `heading` begins a new group of flags in `--help`.
    `path` says that the flag may name a file or folder.
    """
    metadata = {"help": help, "at_least": at_least, "below": below, "heading": heading, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def check_bounds(arguments) -> None:
    """Raise ValueError if a number among a dataclass's knobs lies outside its bounds. NaN lies outside of any."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        at_least, below = field.metadata["at_least"], field.metadata["below"]
        if not value >= at_least:
            raise ValueError(f"{field.name}={value}, but it must be at least {at_least}")
        if value == math.inf:
            raise ValueError(f"{field.name}={value}, but it must be finite")
        if not value < below:
            raise ValueError(f"{field.name}={value}, but it must be below {below}")


@dataclasses.dataclass
class DataArguments:
    corpus: str | None = knob(
        None,
        "python-stdlib; a file of text, .jsonl, .json, .csv, .tsv or .parquet, also compressed or in a .zip or .tar; "
        "a folder or glob of them; an https:// file; a Hub dataset, or one that `datasets` saved; or token files: "
        "nanoGPT's train.bin and val.bin, or shards of llm.c. Without a corpus, data_dir must exist already",
        path=True,
    )
    tokenizer: str = knob(
        "char",
        "char or bpe, made from the corpus; gpt2; a folder or Hub id with a tokenizer; or a text file, whose "
        "characters become the tokens",
        path=True,
    )
    vocab_size: int = knob(4096, "number of tokens of a bpe tokenizer; other tokenizers ignore this flag")
    data_dir: str | None = knob(
        None,
        "folder for the tokens, which a later run finds again; without a corpus, perhaps a Hub id of a shared one",
        path=True,
    )
    corpus_config: str = knob("", "configuration of a Hub dataset")
    corpus_split: str = knob("train", "split of a dataset to train on")
    val_split: str = knob(
        "", "split of a dataset to validate on; without it, val_fraction of corpus_split is held out"
    )
    corpus_revision: str = knob("", "branch, tag or commit of a Hub dataset")
    text_column: str = knob("text", "column of a table that holds the text, or token ids (as input_ids)")
    document_separator: str = knob(
        "", "text that ends a document, as <|endoftext|> in the files of TinyStories; without it, all text is text"
    )
    val_fraction: float = knob(
        0.1, "part held out for validation: of the documents, or of the characters of a single document"
    )
    num_proc: int = knob(1, "processes that tokenize; the result does not depend on their number")
    windows: Literal["random", "epoch", "documents"] = knob(
        "random",
        "windows to train on. random: at random offsets; epoch: each token is a target once an epoch; documents: as "
        "epoch, but each window begins with a document or goes on with one",
    )

    def __post_init__(self):
        self.corpus = self.corpus or None
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}, but bpe needs at least 257: 256 bytes and <|endoftext|>")
        if any(character.isspace() for character in self.document_separator):
            raise ValueError(f"document_separator={self.document_separator[:40]!r}, but it must not hold white space")
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"val_fraction={self.val_fraction}, but it must be between 0 and 1: 0.1 holds out a tenth"
            )
        if self.num_proc < 1:
            raise ValueError(f"num_proc={self.num_proc}, but it must be at least 1")


class HelpLayout(argparse.RawDescriptionHelpFormatter):
    """Help in two columns, the second of which begins further to the right: names of flags are long."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36)


class FlagParser(argparse.ArgumentParser):
    """Dataclasses of knobs as `--key=value` flags. Every mistake is one line and exit status 2.

    Flags are never abbreviated, and an unknown flag is answered with the nearest known one. A ValueError that a
    dataclass raises in its `__post_init__` is such a mistake as well. In `--help`, the flags of a dataclass stand
    under its name without "Arguments", until a knob has a heading.
    """

    def __init__(self, dataclass_types: list[type], **kwargs):
        kwargs.setdefault("usage", "%(prog)s [--key=value ...]")
        super().__init__(allow_abbrev=False, formatter_class=HelpLayout, **kwargs)
        self.dataclass_types = dataclass_types
        for dataclass in dataclass_types:
            group = self.add_argument_group(dataclass.__name__.removesuffix("Arguments").lower())
            types_of = typing.get_type_hints(dataclass)
            for field in dataclasses.fields(dataclass):
                if field.metadata["heading"]:
                    group = self.add_argument_group(field.metadata["heading"])
                options = flag_options(field, types_of[field.name])
                group.add_argument(f"--{field.name}", default=field.default, **options)

    def parse(self, argv: list[str]) -> tuple:
        """One instance of each dataclass, filled from argv. A mistake ends the process."""
        values, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0]
            if flag.endswith((".yaml", ".yml")):
                self.error(f"unexpected {flag!r}: at most one recipe stands before the flags, which are --key=value")
            if not flag.startswith("--"):
                self.error(f"unexpected {flag!r}: flags are written --key=value")
            self.error(self.explain_unknown(flag[2:].split("=")[0]))
        try:
            return tuple(self._fill(dataclass, values) for dataclass in self.dataclass_types)
        except ValueError as mistake:
            self.error(str(mistake))

    def _fill(self, dataclass: type, values: argparse.Namespace):
        return dataclass(**{field.name: getattr(values, field.name) for field in dataclasses.fields(dataclass)})

    def read_recipe(self, argv: list[str], default: Path) -> tuple[Path, list[str]]:
        """The recipe that a command line begins with, or the default one; and the flags of both, in this order.

        hub_configs/NAME.yaml is found from any folder. A mistake in the recipe ends the process.
        """
        recipe, flags = default, argv
        if argv and not argv[0].startswith("-"):
            recipe, flags = Path(argv[0]).expanduser(), argv[1:]
            ours = default.parent.parent / recipe
            if not recipe.exists() and ours.parent == default.parent and ours.exists():
                recipe = ours
        try:
            return recipe, self.flags_of_recipe(recipe, default.parent) + flags
        except ValueError as mistake:
            self.error(f"recipe {recipe}{mistake}")

    def flags_of_recipe(self, path: Path, recipes: Path) -> list[str]:
        """A YAML file as flags: each `key: value` becomes --key=value. A null keeps the default.

        Raises ValueError if the file is not a recipe. If there is no such file, the message names the recipes in the
        folder `recipes`.
        """
        if path.suffix == ".py":
            raise ValueError(" is Python, as in nanoGPT: here a recipe is YAML, one `key: value` a line")
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError:
            known = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
            raise ValueError(f" cannot be read; {recipes.name}/ holds {known}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f" is not YAML: {error}") from None
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(" is not a list of `key: value` lines")
        flags: dict[str, yaml.ScalarNode] = {}
        for key, value in root.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f": line {key.start_mark.line + 1} is not a `key: value` line")
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError(f": {key.value} must be a single value")
            if key.value not in self.keys:
                raise ValueError(f": {self.explain_unknown(key.value)}")
            if key.value in flags:
                raise ValueError(f": {key.value} stands there twice")
            flags[key.value] = value
        null = "tag:yaml.org,2002:null"  # null, ~ or nothing, unless in quotes
        return [f"--{key}={value.value}" for key, value in flags.items() if value.tag != null]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    @property
    def keys(self) -> list[str]:
        """The names of all flags."""
        return [field.name for dataclass in self.dataclass_types for field in dataclasses.fields(dataclass)]

    def explain_unknown(self, key: str) -> str:
        """What to say about a key that is not the name of a flag."""
        if key in INSTEAD:
            return f"{key} is a flag of nanoGPT: {INSTEAD[key]}"
        (nearest,) = difflib.get_close_matches(key, self.keys, n=1, cutoff=0)
        return f"unknown key {key!r}: did you mean {nearest!r}? --help lists all of them"


def one_line(message: object, longest: int = 1000) -> str:
    """A message as one line. If it quotes so much that it is too long, its middle is left out."""
    line = " ".join(str(message).split())
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def flag_options(field: dataclasses.Field, kind: Any) -> dict:
    """How argparse reads a knob of type `kind`, and what `--help` shows for it: its values and its real default."""
    if isinstance(kind, types.UnionType):  # `float | None`: None means that the flag was not given
        kind = typing.get_args(kind)[0]
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    help = field.metadata["help"].replace("%", "%%")
    if default not in (None, ""):
        help += f" (default: {default})"
    if typing.get_origin(kind) is Literal:
        return {"help": help, "choices": typing.get_args(kind)}
    if kind is bool:  # `--push_to_hub` alone is true
        return {"help": help, "metavar": "true|false", "type": read_bool, "nargs": "?", "const": True}
    if kind == bool | Literal["auto"]:
        return {"help": help, "metavar": "auto|true|false", "type": read_switch, "nargs": "?", "const": True}
    read: dict[type, Callable] = {int: read_int, float: read_float, str: read_path if field.metadata["path"] else str}
    names = {int: "N", float: "X", str: "TEXT"}
    return {"help": help, "metavar": names[kind], "type": read[kind]}


def read_bool(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


def read_switch(text: str) -> bool | str:
    if text.lower() not in ("auto", *TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, true nor false")
    return "auto" if text.lower() == "auto" else read_bool(text)


def read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def read_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def read_path(text: str) -> str:
    """A path as a shell would expand it, because no shell does so in a recipe or after `--out_dir=`."""
    path = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise argparse.ArgumentTypeError(f"{text!r}: the environment has no variable {unset[1].strip('{}')}")
    try:
        path.encode(), os.fsencode(path)
    except UnicodeEncodeError:  # Python knows its bytes, but the libraries that write files cannot spell it
        raise argparse.ArgumentTypeError(
            f"{path!r} cannot be spelled in UTF-8 or in this locale: set PYTHONUTF8=1, or take a name in ASCII"
        ) from None
    return path
