"""How much arithmetic training costs, and how much of it the device could do: FLOPs per token, peak rates, MFU."""

import re

import torch

from .configuration_nanogpt import NanoGPTConfig

# Dense 16-bit tensor-core rates in FLOP/s with float32 accumulation, from NVIDIA's data sheets. The first name that is
# found in the device's own counts, so the more specific stand first.
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
    """FLOPs of the forward and backward pass for one trained token, at a context of block_size.

    6 for each weight that multiplies (positions are only looked up) and 12 * n_layer * n_embd * block_size for
    attention, the mask not discounted: PaLM's convention (Chowdhery et al. 2022, appendix B), which nanoGPT uses too.
    """
    attention = 4 * config.n_embd**2
    mlp = 2 * config.n_embd * config.intermediate_size
    weights = config.n_layer * (attention + mlp) + config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit FLOP/s, or None where it is not known, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)
