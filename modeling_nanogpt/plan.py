"""The flags of a recipe that decide about size and speed: the model's shape, the batch, the optimizer.

The trainer knows all flags and checks them. This file reads these flags without the trainer and without torch.
"""

import dataclasses
import json
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent.parent / "hub_configs"
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attn_implementation": ("auto", "sdpa", "plain", "eager", "flex_attention"),
}
GPT2_TOKENS = 50257
# n_layer, n_head and n_embd of OpenAI's models, so that they can be sized without a download
GPT2_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
TEXT_CHARACTERS = 128  # assumed: tiny Shakespeare has 65 characters, and other English texts have about a hundred


@dataclasses.dataclass
class Plan:
    """Flags of the trainer, with the trainer's defaults. None means that a flag was not given."""

    init_from: str = "scratch"
    revision: str | None = None
    tokenizer: str = "char"
    vocab_size: int | None = None
    data_dir: str | None = None
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    dropout: float | None = None
    bias: bool | None = None
    batch_size: int = 12
    gradient_accumulation_steps: int = 40
    max_iters: int = 600_000
    optimizer: str = "adamw"
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    attn_implementation: str = "auto"

    @property
    def shape(self) -> dict:
        """The keys of NanoGPTConfig that were given, without the vocabulary."""
        return {key: getattr(self, key) for key in SHAPE if getattr(self, key) is not None}

    @property
    def windows(self) -> int:
        """Windows in an optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps


KINDS = {field.name: str(field.type) for field in dataclasses.fields(Plan)}


def read_value(key: str, text: str):
    """The value of a flag of Plan. Raises ValueError if the text is not one."""
    kind = KINDS[key]
    if "bool" in kind:
        if text.lower() not in TRUE + FALSE:
            raise ValueError(f"{key}={text}, but it must be true or false")
        return text.lower() in TRUE
    if "str" in kind:
        is_kernel = key == "attn_implementation" and "/" in text  # on the Hub
        if text not in CHOICES.get(key, (text,)) and not is_kernel:
            raise ValueError(f"{key}={text}, but it must be one of {', '.join(CHOICES[key])}")
        return text
    try:
        value = float(text) if "float" in kind else int(text)
    except ValueError:
        name = "number" if "float" in kind else "whole number"
        raise ValueError(f"{key}={text}, but it must be a {name}") from None
    if "int" in kind and value < 1:
        raise ValueError(f"{key}={text}, but it must be at least 1")
    return value


def find_recipe(name: str) -> Path:
    """The file of a recipe. As in the trainer, hub_configs/NAME.yaml is found from any folder."""
    path = Path(name)
    installed = RECIPES.parent / path
    if not path.exists() and installed.parent == RECIPES and installed.exists():
        return installed
    return path


def read_recipe(path: Path, changes: dict[str, str]) -> Plan:
    """The plan of a recipe. `changes` are flags that win over the recipe. Raises ValueError if it is not a recipe."""
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # every value as it is written
    except OSError:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {path} cannot be read; hub_configs/ holds {known}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not YAML: {error}") from None
    if not isinstance(recipe, dict) or not all(isinstance(value, str) for value in recipe.values()):
        raise ValueError(f"recipe {path} is not a list of `key: value` lines")
    given = {key: value for key, value in recipe.items() if key in KINDS and value not in ("", "~", "null")}
    if (given | changes).get("tokenizer", "char") != "bpe":
        given.pop("vocab_size", None)  # the trainer ignores it then
    return Plan(**{key: read_value(key, value) for key, value in (given | changes).items()})


def vocabulary_of(plan: Plan, name: str) -> tuple[int, str]:
    """The number of tokens of a recipe's tokenizer, and where this number comes from.

    `name` is the name of the recipe, and by default the name of its data_dir. A data_dir that is prepared knows its
    number of tokens. Raises ValueError if only the tokenizer itself knows the number.
    """
    data_dir = Path(plan.data_dir or f"data/{name}").expanduser()
    if plan.vocab_size and plan.tokenizer != "bpe":
        return plan.vocab_size, "as given"
    try:
        record = json.loads((data_dir / "prepared.json").read_text(encoding="utf-8"))
        if record["tokenizer"] == plan.tokenizer and plan.tokenizer != "bpe":
            return int(record["vocab_size"]), f"as {data_dir} holds"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a recipe has a size before its text is prepared
    if plan.tokenizer == "bpe":
        return plan.vocab_size or 4096, "as the recipe asks for"
    if plan.tokenizer.removeprefix("openai-community/") == "gpt2":
        return GPT2_TOKENS, "as GPT-2 has"
    if plan.tokenizer == "char":
        return TEXT_CHARACTERS, "assumed, because a char tokenizer has the characters of the text: see --vocab_size"
    raise ValueError(
        f"tokenizer={plan.tokenizer}: its number of tokens is not known before {data_dir} is prepared: give "
        "--vocab_size, or prepare the text with python -m tokenization.prepare"
    )
