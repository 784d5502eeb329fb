"""nanoGPT's checkpoints, this model and GPT-2: pure maps of configurations and weights, both directions side by side.

All three are one network, and nanoGPT's parameter names are ours. GPT-2 in transformers stores the four matrices of a
block transposed (Conv1D), always has biases, and leaves `transformer.` out of the names of a bare model; old files of
both hold their causal masks as buffers. Every map returns new dictionaries and leaves its arguments as they are.
"""

import torch
from transformers import GPT2Config

from .configuration_nanogpt import ACTIVATIONS, NanoGPTConfig

StateDict = dict[str, torch.Tensor]

WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put in front of names
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks; the bias of c_attn is another thing
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BIASED = ("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f")
SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd")  # what all three call the same
SHARED = ("layer_norm_epsilon", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id")

# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT: `model_args` and `model` of its ckpt.pt


def config_from_nanogpt(model_args: dict) -> NanoGPTConfig:
    """The configuration of a nanoGPT model, which has the exact GELU and one dropout for all places."""
    shape = {key: model_args[key] for key in (*SHAPE, "block_size", "bias")}
    return NanoGPTConfig(**shape, dropout=model_args.get("dropout", 0.0), activation_function="gelu")


def config_to_nanogpt(config: NanoGPTConfig) -> dict:
    """The `model_args` of a nanoGPT model; raises ValueError where nanoGPT has no such model."""
    if config.activation_function != "gelu":
        raise ValueError(f"nanoGPT has the exact GELU alone, and this model has {config.activation_function}")
    if config.intermediate_size != 4 * config.n_embd:
        raise ValueError(f"nanoGPT's MLP is 4 * n_embd wide, and this model's is {config.intermediate_size}")
    if not config.tie_word_embeddings:
        raise ValueError("nanoGPT ties its head to the token embedding, and this model does not")
    return {key: getattr(config, key) for key in (*SHAPE, "block_size", "bias", "dropout")}


def weights_from_nanogpt(weights: StateDict) -> StateDict:
    """Weights of ours: the names without what wrappers put in front of them, and without buffers."""
    return {unwrap(name): tensor for name, tensor in weights.items() if not name.endswith(BUFFERS)}


def weights_to_nanogpt(weights: StateDict) -> StateDict:
    """Weights of nanoGPT, which saves the tied head under both of its names."""
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2: GPT2LMHeadModel, or the bare GPT2Model, of transformers


def config_from_gpt2(config: GPT2Config) -> NanoGPTConfig:
    """The configuration of a GPT-2; raises ValueError where it has what this model cannot compute."""
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(f"activation_function={config.activation_function} is none of {', '.join(ACTIVATIONS)}")
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)} is not a plain GPT-2, which has {name}={value}")
    return NanoGPTConfig(
        **{key: getattr(config, key) for key in (*SHAPE, *SHARED)},
        block_size=config.n_positions,
        intermediate_size=config.n_inner,
        activation_function=config.activation_function,
        dropout=config.resid_pdrop,
        bias=True,
    )


def config_to_gpt2(config: NanoGPTConfig, vocab_size: int) -> GPT2Config:
    """The configuration of a stock GPT-2 with the first vocab_size tokens."""
    return GPT2Config(
        **{key: getattr(config, key) for key in (*SHAPE, *SHARED)} | {"vocab_size": vocab_size},
        n_positions=config.block_size,
        n_inner=config.intermediate_size,
        activation_function=config.activation_function,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        pad_token_id=config.pad_token_id,
    )


def weights_from_gpt2(weights: StateDict) -> StateDict:
    """Weights of ours: four matrices a block transposed, `transformer.` in front, no buffers."""
    ours = {}
    for name, tensor in weights.items():
        if not name.endswith(BUFFERS):
            full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            ours[full] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return ours


def weights_to_gpt2(weights: StateDict, vocab_size: int) -> StateDict:
    """Weights of a stock GPT-2: four matrices a block transposed, zero biases where there are none, fewer tokens."""
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
    """Weights of ours for a shorter context: the first block_size positions are as they were."""
    return weights | {"transformer.wpe.weight": weights["transformer.wpe.weight"][:block_size].contiguous()}


def unwrap(name: str) -> str:
    """A parameter's name without what wrappers, in any order, put in front of it."""
    while name.startswith(WRAPPERS):
        name = name[len(next(wrapper for wrapper in WRAPPERS if name.startswith(wrapper))) :]
    return name
