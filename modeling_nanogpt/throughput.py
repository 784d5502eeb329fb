"""How much arithmetic training takes, and how much a device can do: FLOPs a token and peak FLOP/s, for the MFU."""

import torch

from .configuration_nanogpt import NanoGPTConfig
from .gpus import peak_of


def flops_per_token(config: NanoGPTConfig) -> float:
    """FLOPs of the forward and backward pass for one token, at a context of block_size tokens.

    This is PaLM's convention (Chowdhery et al. 2022, appendix B), which nanoGPT also follows: 6 for each weight of a
    matrix product (positions are only looked up), and 12 * n_layer * n_embd * block_size for attention, as if there
    were no causal mask.
    """
    assert config.intermediate_size is not None  # a configuration without it sets its default
    attention = 4 * config.n_embd**2
    mlp = 2 * config.n_embd * config.intermediate_size
    weights = config.n_layer * (attention + mlp) + config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def forward_flops(config: NanoGPTConfig) -> dict[str, float]:
    """FLOPs of the forward pass for one token, by part of the model. Three times their sum is flops_per_token."""
    assert config.intermediate_size is not None
    width, layers = config.n_embd, config.n_layer
    return {
        "attn.c_attn": 2.0 * layers * 3 * width**2,
        "attn: scores": 2.0 * layers * config.block_size * width,
        "attn: values": 2.0 * layers * config.block_size * width,
        "attn.c_proj": 2.0 * layers * width**2,
        "mlp.c_fc": 2.0 * layers * width * config.intermediate_size,
        "mlp.c_proj": 2.0 * layers * width * config.intermediate_size,
        "lm_head": 2.0 * width * config.vocab_size,
    }


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit FLOP/s, or None if that is not known, as for every CPU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))
