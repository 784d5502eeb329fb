"""Where a model can come from: a folder or Hub id, of this project or of GPT-2's architecture, or nanoGPT's ckpt.pt.

The configuration and the weights are read apart, so that a mistake shows before any weight is loaded.
"""

import pickle
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

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


def know_tokens(model: PreTrainedModel, count: int, end: int | None) -> None:
    """Tell a model that its tokenizer has `count` tokens and which of them ends a text; others are never generated."""
    for holder in (model.config, model.generation_config):
        holder.bos_token_id = holder.eos_token_id = holder.pad_token_id = end
    model.generation_config.suppress_tokens = list(range(count, model.config.vocab_size)) or None


def choose_config(init_from: str, given: dict, revision: str | None = None) -> NanoGPTConfig:
    """The model's shape: what is given, or a source's own, which may get another dropout or a smaller block_size.

    `given` holds keys of NanoGPTConfig; raises ValueError where it contradicts the source. `revision` is the branch,
    tag or commit of a Hub id.
    """
    theirs, changes = None, given
    if init_from != "scratch":
        try:
            theirs = read_config(init_from, revision)
        except ValueError as mistake:
            raise ValueError(f"init_from={mistake}") from None
        block_size = min(given.get("block_size", theirs.block_size), theirs.block_size)
        changes = theirs.to_dict() | {"dropout": given.get("dropout", theirs.dropout), "block_size": block_size}
    try:
        config = NanoGPTConfig(**changes)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__)) from None
    if theirs is not None:
        check_given(config, given, init_from)
    return config


def check_given(config: NanoGPTConfig, given: dict, source: str) -> None:
    """Raise ValueError where a given key of NanoGPTConfig is not what the source has."""
    for key, value in given.items():
        theirs = getattr(config, key)
        if value != theirs:
            raise ValueError(f"{key}={value}, but init_from={source} has {key}={theirs}: leave it out")


def load_model(init_from: str, config: NanoGPTConfig, revision: str | None = None) -> NanoGPTForCausalLM:
    """The model that a source holds, in float32; `config` is its own, but for dropout and a smaller block_size."""
    try:
        weights = crop_positions(read_weights(init_from, revision), config.block_size)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None
    return build_model(NanoGPTForCausalLM, config, weights, torch.float32)


def read_config(source: str, revision: str | None = None) -> NanoGPTConfig:
    """The configuration of what a source holds; raises ValueError where that is none of the models we know.

    `revision` is the branch, tag or commit of a Hub id.
    """
    if revision and Path(source).exists():
        raise ValueError(f"{source} is on this machine, but revision={revision} is for a Hub id: leave it out")
    try:
        if ckpt := find_ckpt(source):
            return config_from_nanogpt(read_ckpt(ckpt)["model_args"])
        config = read_auto_config(source, revision)
        if isinstance(config, GPT2Config):
            return config_from_gpt2(config)
        config.use_cache = True  # Trainer saves False, which was for its training: text is generated with a cache
        return config
    except StrictDataclassError as error:
        raise ValueError(f"{source}: {error.__cause__}") from None
    except KeyError as error:
        raise ValueError(f"{source}: its model_args have no {error}") from None


def read_weights(source: str, revision: str | None = None) -> StateDict:
    """The weights of what a source holds, under our names and in their own dtype; raises ValueError without any."""
    if ckpt := find_ckpt(source):
        return weights_from_nanogpt(read_ckpt(ckpt)["model"])
    config = read_auto_config(source, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, trust_remote_code=False, dtype="auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{source} holds no weights that can be read ({first_line(error)})") from None
    return weights_from_gpt2(model.state_dict()) if isinstance(config, GPT2Config) else model.state_dict()


def find_ckpt(source: str) -> Path | None:
    """The path of ckpt.pt where a source is that file, or the folder it is in."""
    path = Path(source)
    if path.is_dir():
        path = path / "ckpt.pt"
    return path if path.is_file() else None


def read_ckpt(path: Path) -> dict:
    """What nanoGPT saved, mapped rather than loaded; no code that the pickle may hold is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint: it holds more than weights, and code in it is not run"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError):
        raise ValueError(f"{path} is not a checkpoint that nanoGPT saved") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} is not nanoGPT's: it has no model and model_args")
    return checkpoint


def read_auto_config(source: str, revision: str | None) -> NanoGPTConfig | GPT2Config:
    """The config.json of a folder or Hub id, of the two architectures that we know."""
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} holds no model ({first_line(error)})") from None
    if not isinstance(config, NanoGPTConfig | GPT2Config):
        raise ValueError(f"{source} holds a model of type {config.model_type}, neither nanogpt nor gpt2")
    return config


def build_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: StateDict, dtype: torch.dtype
) -> PreTrainedModel:
    """A model with just these weights, in this dtype; raises ValueError where they are not all of it, or more."""
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # tensors of another shape
        raise ValueError(f"these weights do not fit the model ({first_line(error)})") from None
    wrong = {str(name) for kind in ("missing_keys", "unexpected_keys") for name in report[kind]}
    if wrong:
        raise ValueError(f"these weights do not fit the model: {', '.join(sorted(wrong))}")
    return model


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries put below it."""
    return str(error).strip().split("\n")[0]
