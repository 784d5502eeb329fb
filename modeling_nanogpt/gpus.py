"""How fast GPUs are: a table that needs no torch, so that a command can check the name of a GPU at once."""

import re

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


def peak_of(name: str) -> float | None:
    """Dense 16-bit FLOP/s of the GPU with this name, or None if the table does not have it."""
    for known, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return peak
    return None
