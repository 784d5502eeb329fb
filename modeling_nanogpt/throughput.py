"""How much arithmetic training takes, and how much a device can do: FLOPs per token and peak FLOP/s, for the MFU."""

import re

import torch

from .configuration_nanogpt import NanoGPTConfig

# Dense 16-bit tensor-core rates in FLOP/s with float32 accumulation, from NVIDIA's data sheets. The first name that is
# part of the device's own name counts, so "H100 PCIe" stands before "H100".
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


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


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit FLOP/s, or None if that is not known, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return peak
    return None
