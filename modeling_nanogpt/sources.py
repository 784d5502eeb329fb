"""Where a model can come from: a folder or Hub id of this project or of GPT-2's architecture, or nanoGPT's ckpt.pt.

Opening a source reads its configuration alone, so a mistake shows before any weight is loaded.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import registration  # noqa: F401  the auto classes know our model from here on
from .configuration_nanogpt import NanoGPTConfig
from .conversion import (
    StateDict,
    config_from_gpt2,
    config_from_nanogpt,
    crop_positions,
    weights_from_gpt2,
    weights_from_nanogpt,
)
from .modeling_nanogpt import NanoGPTForCausalLM

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Source:
    """A model that is there: what its configuration says, and the way to its weights."""

    name: str  # the folder, file or Hub id
    config: NanoGPTConfig
    carries_tokenizer: bool  # nanoGPT's ckpt.pt does not
    weights: Callable[[], StateDict]  # under our names, in their own dtype; ValueError if they cannot be read

    def model(self, config: NanoGPTConfig) -> NanoGPTForCausalLM:
        """The model in float32. `config` may differ from the source's in dropout, and in a smaller block_size."""
        weights = crop_positions(self.weights(), config.block_size)
        try:
            return build_model(NanoGPTForCausalLM, config, weights, torch.float32)
        except ValueError as mistake:
            raise ValueError(f"{self.name}: {mistake}") from None


def open_source(name: str, revision: str | None = None) -> Source:
    """Recognise what a name stands for and read its configuration.

    `revision` is the branch, tag or commit of a Hub id. Raises ValueError if this is not a model that we know.
    """
    path = Path(name)
    if revision and path.exists():
        raise ValueError(f"{name} is on this machine, but revision={revision} is for a Hub id: leave out --revision")
    if path.is_dir() and (path / "ckpt.pt").is_file():
        path = path / "ckpt.pt"
    try:
        return open_ckpt(name, path) if path.is_file() else open_pretrained(name, revision)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {error.__cause__}") from None


def open_ckpt(name: str, path: Path) -> Source:
    """The ckpt.pt that nanoGPT saved. Its weights are mapped from the disk; code in the pickle does not run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights, and code in it is not run: give a ckpt.pt that nanoGPT saved"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError):
        raise ValueError(f"{path} cannot be read as a checkpoint: give a whole ckpt.pt that nanoGPT saved") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} has no `model` and `model_args`: give a ckpt.pt that nanoGPT saved")
    try:
        config = config_from_nanogpt(checkpoint["model_args"])
    except KeyError as error:
        raise ValueError(f"{path} has no {error} in its `model_args`: give a ckpt.pt that nanoGPT saved") from None
    return Source(
        name=name,
        config=config,
        carries_tokenizer=False,
        weights=lambda: weights_from_nanogpt(checkpoint["model"]),
    )


def open_pretrained(name: str, revision: str | None) -> Source:
    """A folder or Hub id with a config.json, of this project's architecture or of GPT-2's."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} holds no model ({first_line(error)}): give a folder, a Hub id or nanoGPT's ckpt.pt"
        ) from None

    def read_weights() -> StateDict:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, config=config, dtype="auto", trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{name} holds no weights that can be read ({first_line(error)})") from None
        return model.state_dict()

    if isinstance(config, NanoGPTConfig):
        config.use_cache = True  # Trainer turns the cache off for its training, and saves that; generation needs it
        return Source(name=name, config=config, carries_tokenizer=True, weights=read_weights)
    if isinstance(config, GPT2Config):
        return Source(
            name=name,
            config=config_from_gpt2(config),
            carries_tokenizer=True,
            weights=lambda: weights_from_gpt2(read_weights()),
        )
    raise ValueError(f"{name} holds a model of type {config.model_type}, but only nanogpt and gpt2 can be read")


def choose_config(given: dict, source: Source | None) -> NanoGPTConfig:
    """The shape of the model to train: from the flags; or the source's, with another dropout or a smaller block_size.

    `given` holds keys of NanoGPTConfig. Raises ValueError if they contradict the source, or cannot form a model.
    """
    changes = given
    if source is not None:
        theirs = source.config
        block_size = min(given.get("block_size", theirs.block_size), theirs.block_size)
        changes = theirs.to_dict() | {"dropout": given.get("dropout", theirs.dropout), "block_size": block_size}
    try:
        config = NanoGPTConfig(**changes)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__)) from None
    if source is not None:
        check_given(config, given, source.name)
    return config


def check_given(config: NanoGPTConfig, given: dict, source: str) -> None:
    """Raise ValueError if a given key of NanoGPTConfig is not what the source has."""
    for key, value in given.items():
        theirs = getattr(config, key)
        if value != theirs:
            raise ValueError(f"{key}={value}, but init_from={source} has {key}={theirs}: leave it out")


def build_model(model_class: type[Model], config: PreTrainedConfig, weights: StateDict, dtype: torch.dtype) -> Model:
    """A model with exactly these weights, in this dtype; raises ValueError if some are missing or left over."""
    try:
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # tensors of another shape
        raise ValueError(
            f"the weights do not fit the configuration ({first_line(error)}): fetch or save the model again"
        ) from None
    model, report = loaded  # transformers' annotation knows only the model
    wrong = {str(name) for kind in ("missing_keys", "unexpected_keys") for name in report[kind]}
    if wrong:
        raise ValueError(
            f"the weights do not fit the configuration ({', '.join(sorted(wrong))}): fetch or save the model again"
        )
    return model


def adopt_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model and its tokenizer fit: where texts end, which ids there are, and how long a text may be.

    The model's vocabulary may be padded beyond the tokenizer's. If the tokenizer has no token for the beginning of a
    text or for padding, its end-of-text token serves for both.
    """
    end = tokenizer.eos_token_id
    for holder in (model.config, model.generation_config):
        holder.eos_token_id = end
        holder.bos_token_id = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        holder.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    padding = list(range(len(tokenizer), model.config.vocab_size))
    model.generation_config.suppress_tokens = padding or None


def first_line(error: BaseException | str) -> str:
    """What went wrong, without the advice that libraries put below it."""
    return str(error).strip().split("\n")[0]
