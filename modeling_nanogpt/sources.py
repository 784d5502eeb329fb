"""Where a model can come from: a folder or Hub id of this project or of GPT-2's architecture, nanoGPT's ckpt.pt, a
state dict, or llm.c's model.bin.

Opening a source only reads its configuration, so a mistake shows before weights are loaded.
"""

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
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
from transformers.utils import cached_file, logging

from . import (
    llmc,
    registration,  # noqa: F401  the auto classes know our model from here on
)
from .configuration_nanogpt import NanoGPTConfig
from .conversion import (
    BUFFERS,
    StateDict,
    config_from_gpt2,
    config_from_nanogpt,
    crop_positions,
    is_tied,
    some_of,
    weights_from_gpt2,
    weights_from_nanogpt,
)
from .modeling_nanogpt import NanoGPTForCausalLM

Model = TypeVar("Model", bound=PreTrainedModel)

# Numbers as NumPy pickles them, in versions 1 and 2: they hold no code, and forks of nanoGPT save some.
NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

# Files of older releases hold masks and positions, which are computed now: GPT-2's, and others that sample may load.
OLD_BUFFERS = (*BUFFERS, ".attention.bias", ".attention.masked_bias", ".inv_freq", ".position_ids")

# What the checkpoints of nanoGPT and its forks call the weights.
WEIGHTS = ("model", "model_state_dict", "state_dict")

# Models of other architectures, by a part of the names of their weights; and files, by their first bytes.
OTHER_MODELS = {
    ".attn.c_q.weight": "a nanochat model",
    ".self_attn.q_proj.weight": "a Llama model, or one of its successors",
    ".attention.wq.weight": "a Llama model",
    ".attn.qkv.weight": "a litgpt model",
    ".attention.query_key_value.weight": "a GPT-NeoX model",
}
OTHER_FILES = {
    b"GGUF": "a GGUF file",
    b"24ka": "a model of llama2.c",
    (20240803).to_bytes(4, "little"): "a Llama model of llm.c",
    (20240327).to_bytes(4, "little"): "a state of llm.c for its tests",
}


class Misfit(ValueError):
    """Weights that are not those which a configuration asks for."""


@dataclass(frozen=True)
class Source:
    """A model that is there: what its configuration says, and the way to its weights."""

    name: str  # the folder, file or Hub id
    config: NanoGPTConfig
    carries_tokenizer: bool  # a file does not
    weights: Callable[[], StateDict]  # under our names, in their own dtype; ValueError if they cannot be read
    has_optimizer: bool = False  # nanoGPT's ckpt.pt also holds the optimizer's state

    def read(self) -> tuple[NanoGPTConfig, StateDict]:
        """The configuration and the weights. Whether the head is tied is what the weights say, as in transformers."""
        weights = self.weights()
        self.config.tie_word_embeddings = is_tied(weights)
        return self.config, weights

    def model(self, config: NanoGPTConfig) -> NanoGPTForCausalLM:
        """The model in float32. `config` may differ from the source's in dropout, and in a smaller block_size."""
        theirs, weights = self.read()
        config.tie_word_embeddings = theirs.tie_word_embeddings
        weights = crop_positions(weights, config.block_size)
        try:
            return build_model(NanoGPTForCausalLM, config, weights, torch.float32)
        except ValueError as mistake:
            raise ValueError(f"{self.name}: {mistake}") from None


def open_source(name: str, revision: str | None = None, n_head: int | None = None) -> Source:
    """Recognise what a name stands for and read its configuration.

    `revision` is the branch, tag or commit of a Hub id. `n_head` is for a state dict, whose shapes do not show the
    number of heads. Raises ValueError if this is not a model that we know.
    """
    # os.path says no to a name that is too long for a file; Path raises an error
    if revision and os.path.exists(name):
        raise ValueError(f"{name} is on this machine, but revision={revision} is for a Hub id: leave out --revision")
    path = Path(name, "ckpt.pt") if os.path.isfile(os.path.join(name, "ckpt.pt")) else Path(name)
    try:
        return open_file(name, path, n_head) if os.path.isfile(path) else open_pretrained(name, revision)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {first_line(error)}") from None


def open_file(name: str, path: Path, n_head: int | None) -> Source:
    """A model in one file, without a tokenizer: llm.c's model.bin, or what torch.save wrote."""
    with open(path, "rb") as file:
        begins = file.read(4)
    if begins in OTHER_FILES:
        raise ValueError(f"{path} is {OTHER_FILES[begins]}, but only GPT-2's architecture can be read")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds only weights: give the folder that holds this file and config.json")
    if not llmc.is_llmc(path):
        return open_ckpt(name, path, n_head)
    try:
        config, *_ = llmc.read_header(path)
    except ValueError as mistake:
        raise ValueError(f"{path} cannot be read: {mistake}") from None
    return Source(name=name, config=config, carries_tokenizer=False, weights=lambda: llmc.read_weights(path))


def open_ckpt(name: str, path: Path, n_head: int | None) -> Source:
    """The ckpt.pt of nanoGPT or of a fork, or a state dict. The weights are mapped from the disk."""
    checkpoint = load_pickle(path)
    weights, model_args = parts_of(checkpoint, path, n_head)
    for part, kind in OTHER_MODELS.items():
        if any(part in f".{key}" for key in weights):
            raise ValueError(f"{path} holds {kind}, but only GPT-2's architecture can be read")
    weights = weights_from_nanogpt(weights)
    if lies_as_gpt2(weights):
        weights = weights_from_gpt2(weights)
        model_args.pop("bias", None)  # GPT-2 has the tanh form of GELU, as nanoGPT had before this key existed
    try:
        config = config_from_nanogpt(model_args, weights)
    except ValueError as mistake:
        raise ValueError(f"{path} cannot be read as nanoGPT's: {mistake}") from None
    return Source(
        name=name,
        config=config,
        carries_tokenizer=False,
        weights=lambda: weights,
        has_optimizer="optimizer" in checkpoint,
    )


def load_pickle(path: Path) -> Any:
    """What torch.save wrote. Code in the pickle does not run."""
    try:
        mapped = zipfile.is_zipfile(path)  # what torch before 1.6 saved cannot be mapped
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights, and code in it is not run: give a ckpt.pt that nanoGPT saved"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError):
        raise ValueError(f"{path} cannot be read as a checkpoint: give a whole ckpt.pt that nanoGPT saved") from None


def parts_of(checkpoint: Any, path: Path, n_head: int | None) -> tuple[StateDict, dict]:
    """The weights of a checkpoint and its model_args. For a state dict, model_args has only what is known.

    Raises ValueError if there are no weights, or if the number of heads is not known.
    """
    key = next((key for key in WEIGHTS if isinstance(checkpoint, dict) and key in checkpoint), None)
    weights = checkpoint if key is None else checkpoint[key]  # without such a key, it may be a state dict
    if not is_state_dict(weights) or (key is None and not weights):
        raise ValueError(
            f"{path} has no weights in `model` and no `model_args`: give a ckpt.pt that nanoGPT saved, or a state dict"
        )
    if key is not None and "model_args" in checkpoint:
        if not isinstance(checkpoint["model_args"], dict):
            raise ValueError(f"the `model_args` of {path} are not a dict: give a ckpt.pt that nanoGPT saved")
        return weights, dict(checkpoint["model_args"])
    settings = checkpoint.get("config") if key is not None else None
    heads = settings.get("n_head", n_head) if isinstance(settings, dict) else n_head
    if heads is None:
        raise ValueError(f"{path} does not say how many heads its model has: give the number by --n_head")
    return weights, {"n_head": heads, "bias": None}


def lies_as_gpt2(weights: StateDict) -> bool:
    """Whether the matrices of the layers are stored transposed, as in transformers' GPT-2."""
    fused = [tensor for name, tensor in weights.items() if name.endswith(".attn.c_attn.weight") and tensor.ndim == 2]
    return bool(fused) and fused[0].shape[0] < fused[0].shape[1]


def is_state_dict(content: object) -> bool:
    """Whether this is names and tensors."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()
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
        return load_model(name, revision, config).state_dict()

    if isinstance(config, NanoGPTConfig):
        config.use_cache = True  # Trainer turns the cache off for its training, and saves that; generation needs it
        return Source(name=name, config=config, carries_tokenizer=True, weights=read_weights)
    if isinstance(config, GPT2Config):
        try:
            ours = config_from_gpt2(config)
        except ValueError as mistake:
            raise ValueError(f"{name}: {mistake}") from None
        return Source(
            name=name,
            config=ours,
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
        raise ValueError(first_line(error)) from None
    if source is not None:
        check_given(config, given, source.name)
    return config


def check_given(config: NanoGPTConfig, given: dict, source: str) -> None:
    """Raise ValueError if a given key of NanoGPTConfig is not what the source has."""
    for key, value in given.items():
        theirs = getattr(config, key)
        if value != theirs:
            raise ValueError(f"{key}={value}, but init_from={source} has {key}={theirs}: leave it out")


def load_model(name: str, revision: str | None = None, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The causal language model of a folder or Hub id, in its own dtype. Code that is in its files does not run.

    Raises ValueError if the weights cannot be read, and if some are missing, left over or of another shape.
    """
    try:
        return load_exactly(
            AutoModelForCausalLM, name, revision=revision, config=config, dtype="auto", trust_remote_code=False
        )
    except Misfit as mistake:
        raise ValueError(f"{name}: {mistake}") from None
    except pickle.UnpicklingError:
        reason = "torch does not load them: the file is damaged, or holds code, which is not run"
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, StrictDataclassError) as error:
        reason = first_line(error) or type(error).__name__
    raise ValueError(f"{name} holds no weights that can be read ({reason})")


def build_model(model_class: type[Model], config: PreTrainedConfig, weights: StateDict, dtype: torch.dtype) -> Model:
    """A model with exactly these weights, in this dtype; raises ValueError if they do not fit."""
    return load_exactly(model_class, None, config=config, state_dict=weights, dtype=dtype)


def load_exactly(model_class: Any, name: str | None, **options) -> Any:
    """from_pretrained of a class. Raises Misfit if weights are missing, left over or of another shape.

    transformers draws a weight that is missing at random, ignores one that is left over, and goes on.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report has a line for each weight
    try:
        model, report = model_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    wrong = {key for key in report["unexpected_keys"] if not key.endswith(OLD_BUFFERS)}
    wrong |= {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if wrong:
        raise Misfit(
            f"the weights do not fit the configuration ({some_of(sorted(wrong))}): fetch or save the model again"
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
    model.generation_config.max_length = model.config.max_position_embeddings  # for callers that name no length
    never = {*range(len(tokenizer), model.config.vocab_size), model.config.pad_token_id} - {None, end}
    model.generation_config.suppress_tokens = sorted(never) or None


def find_file(name: str, file: str, revision: str | None = None) -> str | None:
    """The path of a file in a folder or of a Hub id, on this machine; None if there is no such file."""
    path: str | None = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def first_line(error: BaseException | str) -> str:
    """What went wrong, without the advice that libraries put below it, and at most 300 characters of it."""
    if isinstance(error, StrictDataclassError):  # its own text only says that the cause is one
        error = error.__cause__ or error
    return str(error).strip().split("\n")[0][:300]
