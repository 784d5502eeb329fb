"""The flags that say what to train on, and the parser that all flags of the project go through."""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Literal, NoReturn

import yaml
from transformers import HfArgumentParser


def knob(default, help: str):
    """A dataclass field with its default and the line that --help shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class DataArguments:
    corpus: str | None = knob(
        None,
        "python-stdlib; a file of text, .jsonl, .json, .csv, .tsv or .parquet, also compressed or in a .zip or .tar; "
        "a folder or glob of them; an https:// file; a Hub dataset, or one that `datasets` saved; or token files: "
        "nanoGPT's train.bin and val.bin, or shards of llm.c. Without it data_dir must be there already",
    )
    tokenizer: str = knob(
        "char",
        "char or bpe, made from the corpus; gpt2; a folder or Hub id that holds a tokenizer; or a text file, whose "
        "characters are the tokens",
    )
    vocab_size: int = knob(4096, "tokens in a bpe tokenizer; the others ignore it")
    data_dir: str | None = knob(
        None, "where the tokens are, or will be written; without corpus, a Hub id of a shared data_dir as well"
    )
    corpus_config: str = knob("", "configuration of a Hub dataset")
    corpus_split: str = knob("train", "split of a dataset to train on")
    val_split: str = knob(
        "", "split of a dataset to validate on; without it, val_fraction of corpus_split is held out"
    )
    corpus_revision: str = knob("", "branch, tag or commit of a Hub dataset")
    text_column: str = knob("text", "column of a table that holds the text, or token ids (as input_ids)")
    val_fraction: float = knob(0.1, "held out for validation: of the documents, or of the characters of a single one")
    num_proc: int = knob(1, "processes that tokenize; the result does not depend on it")
    windows: Literal["random", "epoch", "documents"] = knob(
        "random",
        "windows to train on: at random offsets; each token as a target once an epoch; or the same, with windows that "
        "begin where documents do",
    )

    def __post_init__(self):
        for flag in ("corpus", "tokenizer", "data_dir"):
            if (getattr(self, flag) or "").startswith("~"):
                setattr(self, flag, os.path.expanduser(getattr(self, flag)))
        self.corpus = self.corpus or None
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}, but bpe needs 257 at least: 256 bytes and <|endoftext|>")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}, but it must be between 0 and 1, as 0.1")
        if self.num_proc < 1:
            raise ValueError(f"num_proc={self.num_proc}, but it must be at least 1")


class FlagParser(HfArgumentParser):
    """Dataclasses as `--key=value` flags, in which every mistake is one line and exit status 2.

    Flags are never abbreviated; an unknown one is answered with the nearest known one. A ValueError that a dataclass
    raises in its `__post_init__` is such a mistake as well.
    """

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def parse(self, argv: list[str]) -> tuple:
        """One instance of each dataclass, filled from argv; exits on a mistake."""
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as mistake:
            self.error(str(mistake))
        if unknown:
            flag = unknown[0]
            if not flag.startswith("--"):
                self.error(f"unexpected {flag!r}: flags are written --key=value")
            self.error(self.explain_unknown(flag[2:].split("=")[0]))
        return tuple(parsed)

    def read_recipe(self, path: Path, recipes: Path) -> list[str]:
        """A YAML file as flags: each `key: value` becomes --key=value; a null keeps the default.

        Raises ValueError where it is none; where there is no such file, that names those in the folder `recipes`.
        """
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError:
            known = ", ".join(sorted(str(recipe.stem) for recipe in recipes.glob("*.yaml")))
            raise ValueError(f"recipe {path} cannot be read; {recipes.name}/ holds {known}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {path} is not YAML: {error}") from None
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"recipe {path} is not a list of `key: value` lines")
        flags = {}
        for key, value in root.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"recipe {path}: line {key.start_mark.line + 1} is no `key: value`")
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError(f"recipe {path}: {key.value} must be a single value")
            if key.value not in self.keys:
                raise ValueError(f"recipe {path}: {self.explain_unknown(key.value)}")
            if key.value in flags:
                raise ValueError(f"recipe {path}: {key.value} stands there twice")
            flags[key.value] = value
        null = "tag:yaml.org,2002:null"  # null, ~ or nothing, unless in quotes
        return [f"--{key}={value.value}" for key, value in flags.items() if value.tag != null]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @property
    def keys(self) -> list[str]:
        """The names of all flags."""
        return [field.name for dataclass in self.dataclass_types for field in dataclasses.fields(dataclass)]

    def explain_unknown(self, key: str) -> str:
        """What to say of a key that is not a flag's name."""
        near = difflib.get_close_matches(key, self.keys, n=1, cutoff=0)
        return f"unknown key {key!r}: did you mean {near[0]!r}? --help lists all of them"
