"""llm.c's model.bin: a header of 256 int32, then the weights of a GPT-2, those of all layers stacked in one tensor.

train_gpt2.py and train_gpt2.cu in github.com/karpathy/llm.c write the format. All numbers are little-endian.
"""

import math
from pathlib import Path

import numpy as np
import torch

from .configuration_nanogpt import NanoGPTConfig
from .conversion import StateDict

MAGIC = 20240326  # the first number of the header
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # version (the second number) -> dtype of the weights
HEADER = 1024  # length of the header in bytes


def is_llmc(path: Path) -> bool:
    """Whether a file begins as llm.c's models do."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_header(path: Path) -> tuple[NanoGPTConfig, torch.dtype, int]:
    """The configuration, the dtype, and the number of rows of the token embedding, which may be padded.

    Raises ValueError if the version is unknown, or if the length of the file does not fit its header.
    """
    numbers = np.fromfile(path, dtype="<i4", count=HEADER // 4)
    if len(numbers) < HEADER // 4:
        raise ValueError("the file ends within its header: fetch or copy the file again")
    version, positions, vocabulary, layers, heads, width, rows = (int(number) for number in numbers[1:8])
    if version not in DTYPES:
        raise ValueError(f"its version of llm.c's format is {version}, but only versions 3 and 5 can be read")
    config = NanoGPTConfig(
        vocab_size=vocabulary,
        block_size=positions,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        bias=True,
        activation_function="gelu_new",  # llm.c computes GPT-2's tanh form
    )
    count = sum(math.prod(shape) for shape in shapes_of(config, rows).values())
    expected, size = HEADER + count * DTYPES[version].itemsize, path.stat().st_size
    if size != expected:
        raise ValueError(f"it has {size:,} bytes, but its header needs {expected:,}: fetch or copy the file again")
    return config, DTYPES[version], rows


def read_weights(path: Path) -> StateDict:
    """The weights under our names, in their own dtype. They are mapped from the disk, and read when they are used."""
    config, dtype, rows = read_header(path)
    numbers = torch.from_file(str(path), dtype=dtype, size=path.stat().st_size // dtype.itemsize)
    start = HEADER // dtype.itemsize
    weights: StateDict = {}
    for name, shape in shapes_of(config, rows).items():
        end = start + math.prod(shape)
        tensor = numbers[start:end].view(shape)
        start = end
        if name.startswith("h."):
            kind = name.removeprefix("h.")
            weights |= {f"transformer.h.{layer}.{kind}": tensor[layer] for layer in range(config.n_layer)}
        else:
            weights[f"transformer.{name}"] = tensor
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: config.vocab_size]
    return weights


def shapes_of(config: NanoGPTConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a file, in their order. A tensor h.* stacks the weights of all layers.

    `rows` is the number of rows of the token embedding.
    """
    layers, width = config.n_layer, config.n_embd
    return {
        "wte.weight": (rows, width),
        "wpe.weight": (config.block_size, width),
        "h.ln_1.weight": (layers, width),
        "h.ln_1.bias": (layers, width),
        "h.attn.c_attn.weight": (layers, 3 * width, width),
        "h.attn.c_attn.bias": (layers, 3 * width),
        "h.attn.c_proj.weight": (layers, width, width),
        "h.attn.c_proj.bias": (layers, width),
        "h.ln_2.weight": (layers, width),
        "h.ln_2.bias": (layers, width),
        "h.mlp.c_fc.weight": (layers, 4 * width, width),
        "h.mlp.c_fc.bias": (layers, 4 * width),
        "h.mlp.c_proj.weight": (layers, width, 4 * width),
        "h.mlp.c_proj.bias": (layers, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
