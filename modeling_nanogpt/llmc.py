"""llm.c's model.bin: a header of 256 int32, then the weights of a GPT-2, each kind for all layers in one piece.

The format is that of train_gpt2.py and train_gpt2.cu in github.com/karpathy/llm.c. All numbers are little-endian.
"""

import math
from pathlib import Path

import numpy as np
import torch

from .configuration_nanogpt import NanoGPTConfig
from .conversion import StateDict

MAGIC = 20240326  # the first number of the header
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by the second, the version
HEADER = 1024  # bytes


def is_llmc(path: Path) -> bool:
    """Whether a file begins as llm.c's models do."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_header(path: Path) -> tuple[NanoGPTConfig, torch.dtype, int]:
    """The configuration, the dtype, and the rows of the token embedding. Some rows may lie beyond the vocabulary.

    Raises ValueError if the version is unknown, or if the file is not as long as its header asks for.
    """
    numbers = np.fromfile(path, dtype="<i4", count=HEADER // 4)
    if len(numbers) < HEADER // 4:
        raise ValueError("its header is cut off: fetch or copy the file again")
    version, positions, vocabulary, layers, heads, width, rows = (int(number) for number in numbers[1:8])
    if version not in DTYPES:
        raise ValueError(f"it is a model of llm.c in version {version}, but only versions 3 and 5 can be read")
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
        raise ValueError(f"it has {size:,} bytes, but its header asks for {expected:,}: fetch or copy the file again")
    return config, DTYPES[version], rows


def read_weights(path: Path) -> StateDict:
    """The weights under our names, in their own dtype. They are mapped from the disk."""
    config, dtype, rows = read_header(path)
    start = HEADER // dtype.itemsize
    numbers = torch.from_file(str(path), dtype=dtype, size=path.stat().st_size // dtype.itemsize)[start:]
    weights: StateDict = {}
    for name, shape in shapes_of(config, rows).items():
        tensor, numbers = numbers[: math.prod(shape)].view(shape), numbers[math.prod(shape) :]
        if name.startswith("h."):
            kind = name.removeprefix("h.")
            weights |= {f"transformer.h.{layer}.{kind}": tensor[layer] for layer in range(config.n_layer)}
        else:
            weights[f"transformer.{name}"] = tensor
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: config.vocab_size]
    return weights


def shapes_of(config: NanoGPTConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """The pieces of a file in their order. A piece named h.* has the weights of all layers, one after the other."""
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
