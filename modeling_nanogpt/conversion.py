"""nanoGPT's checkpoints, this model and GPT-2: maps of configurations and weights, both directions side by side.

All three are the same network, and this model has nanoGPT's parameter names. GPT-2 in transformers stores the four
matrices of a block transposed (Conv1D), always has biases, and leaves `transformer.` out of the names of a bare model.
Old files of both also hold causal masks. Every map returns a new dictionary and does not change its arguments.
"""

from typing import Any

import numpy as np
import torch
from transformers import GPT2Config

from .configuration_nanogpt import ACTIVATIONS, NanoGPTConfig

StateDict = dict[str, torch.Tensor]

WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DDP, torch.compile and Lightning put in front of names
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, unlike `.attn.c_attn.bias`
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BIASED = ("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f")
SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd")  # fields with one name in all three
MODEL_ARGS = (*SHAPE, "block_size", "bias", "dropout")  # what nanoGPT calls a model's shape
SHARED = ("layer_norm_epsilon", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id")

# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT: `model_args` and `model` of its ckpt.pt


def config_from_nanogpt(model_args: dict, weights: StateDict) -> NanoGPTConfig:
    """The configuration of a nanoGPT model. What its weights show is read from them; `weights` have our names.

    Raises ValueError if model_args has something that this model does not have, or contradicts the weights.
    """
    # some forks compute the shape with NumPy
    model_args = {key: value.item() if isinstance(value, np.generic) else value for key, value in model_args.items()}
    foreign = [
        f"{key}={value!r}"[:60]
        for key, value in model_args.items()
        if key not in MODEL_ARGS and value is not None and value is not False
    ]
    if foreign:
        raise ValueError(
            f"its model_args have {some_of(foreign)}, which nanoGPT does not have and nothing here computes"
        )
    if "n_head" not in model_args:
        raise ValueError("it has no n_head in its model_args")
    matrices = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight")
    for name in matrices:
        if name not in weights or weights[name].ndim != 2:
            raise ValueError(f"it has no matrix {name}")

    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"its weight {name} is {tensor.dtype}, but a weight must be a floating-point number")

    embedding, positions, hidden = (weights[name] for name in matrices)
    facts: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "n_embd": embedding.shape[1],
        "block_size": positions.shape[0],
        "n_layer": len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")}),
        "bias": "transformer.ln_f.bias" in weights,
    }
    for key, value in facts.items():
        if model_args.get(key) not in (None, value):
            raise ValueError(f"its model_args have {key}={str(model_args[key])[:40]}, but its weights {key}={value}")
    return NanoGPTConfig(
        **facts,
        n_head=model_args["n_head"],
        intermediate_size=hidden.shape[0],
        dropout=model_args.get("dropout") or 0.0,
        # Until January 2023, nanoGPT had no flag `bias`: each model had biases, and GPT-2's approximation of GELU.
        activation_function="gelu_new" if facts["bias"] and "bias" not in model_args else "gelu",
        tie_word_embeddings=is_tied(weights),
    )


def is_tied(weights: StateDict) -> bool:
    """Whether the head is the token embedding; `weights` have our names."""
    head, embedding = weights.get("lm_head.weight"), weights["transformer.wte.weight"]
    return head is None or head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)


def config_to_nanogpt(config: NanoGPTConfig) -> dict:
    """The `model_args` of a nanoGPT model; raises ValueError if nanoGPT cannot compute this model."""
    if config.activation_function != "gelu":
        raise ValueError(
            f"activation_function={config.activation_function}, but nanoGPT can only compute the exact GELU: convert "
            "to gpt2 instead"
        )
    if config.intermediate_size != 4 * config.n_embd:
        raise ValueError(
            f"intermediate_size={config.intermediate_size}, but in nanoGPT it is 4 * n_embd: convert to gpt2 instead"
        )
    if config.layer_norm_epsilon != 1e-5:
        raise ValueError(
            f"layer_norm_epsilon={config.layer_norm_epsilon}, but in nanoGPT it is 1e-5: convert to gpt2 instead"
        )
    if not config.tie_word_embeddings:
        raise ValueError(
            "the head is not the token embedding (tie_word_embeddings=False), but nanoGPT ties its head to the token "
            "embedding: convert to gpt2 instead"
        )
    return {key: getattr(config, key) for key in MODEL_ARGS}


def weights_from_nanogpt(weights: StateDict) -> StateDict:
    """This model's weights: the wrappers' prefixes and the masks are left out."""
    return {unwrap(name): tensor for name, tensor in weights.items() if not name.endswith(BUFFERS)}


def weights_to_nanogpt(weights: StateDict) -> StateDict:
    """nanoGPT's weights: it saves the tied matrix under both of its names."""
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2: GPT2LMHeadModel, or the bare GPT2Model, of transformers


def config_from_gpt2(config: GPT2Config) -> NanoGPTConfig:
    """The configuration of a GPT-2; raises ValueError if this model cannot compute that GPT-2."""
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"a GPT-2 with activation_function={config.activation_function} cannot be converted: the network here "
            f"has {', '.join(ACTIVATIONS)}"
        )
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"a GPT-2 with {name}={getattr(config, name)} cannot be converted: the network here has {name}={value}"
            )
    dropouts = {name: getattr(config, name) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(dropouts.values())) > 1:
        given = ", ".join(f"{name}={value}" for name, value in dropouts.items())
        raise ValueError(
            f"a GPT-2 with {given} cannot be converted: the network here has one dropout for all three; give them one "
            "value in its config.json"
        )
    return NanoGPTConfig(
        **{key: getattr(config, key) for key in (*SHAPE, *SHARED)},
        block_size=config.n_positions,
        intermediate_size=config.n_inner,
        activation_function=config.activation_function,
        dropout=config.resid_pdrop,
        bias=True,
    )


def config_to_gpt2(config: NanoGPTConfig, vocab_size: int) -> GPT2Config:
    """The configuration of a stock GPT-2 that keeps the first vocab_size tokens."""
    shape = {key: getattr(config, key) for key in (*SHAPE, *SHARED)} | {"vocab_size": vocab_size}
    shape["n_ctx"] = config.block_size  # transformers does not read it any more, but llama.cpp's converter does
    return GPT2Config(
        **shape,
        n_positions=config.block_size,
        n_inner=config.intermediate_size,
        activation_function=config.activation_function,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        pad_token_id=config.pad_token_id,
    )


def weights_from_gpt2(weights: StateDict) -> StateDict:
    """This model's weights: four matrices of each block transposed, `transformer.` in front, masks left out."""
    ours = {}
    for name, tensor in weights.items():
        if not name.endswith(BUFFERS):
            full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            ours[full] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return ours


def weights_to_gpt2(weights: StateDict, vocab_size: int) -> StateDict:
    """A stock GPT-2's weights: four matrices of each block transposed, missing biases zero, the first tokens kept."""
    gpt2 = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if name in ("transformer.wte.weight", "lm_head.weight"):
            tensor = tensor[:vocab_size].contiguous()
        if kind == "weight" and layer.endswith(BIASED):
            gpt2[f"{layer}.bias"] = weights.get(f"{layer}.bias", tensor.new_zeros(len(tensor)))
        gpt2[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return gpt2


# ---------------------------------------------------------------------------------------------------------------------


def crop_positions(weights: StateDict, block_size: int) -> StateDict:
    """This model's weights for a shorter context: the first block_size positions."""
    return weights | {"transformer.wpe.weight": weights["transformer.wpe.weight"][:block_size].contiguous()}


def unwrap(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put in front of it, in any order."""
    while name.startswith(WRAPPERS):
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def some_of(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many others it has."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others} others" if others > 0 else "")
