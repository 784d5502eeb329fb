"""A stock GPT-2 as an ONNX file with a key/value cache, in the form that transformers.js, onnxruntime and optimum run.

The inputs are input_ids (B, T), attention_mask (B, S), position_ids (B, T), all int64, and the cache: for each layer N
past_key_values.N.key and past_key_values.N.value (B, H, S - T, D). The outputs are logits (B, T, V) float32 and the
longer cache, present.N.key and present.N.value (B, H, S, D). A sequence begins with an empty cache, S - T = 0.

Shapes: B sequences, T tokens, S tokens with those in the cache, H heads of D dimensions, V = vocab_size.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import CACHE, NanoGPTForCausalLM

FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx"}  # names in transformers.js
LARGEST = 2**31  # bytes: an ONNX file is a protocol buffer, which cannot hold more


class CachedGPT2(nn.Module):
    """A GPT-2 that takes and returns its cache as plain tensors, because ONNX knows only tensors."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        """Returns the logits, then the longer cache. `past` and this cache are key, value, key, value, … by layer."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=additive_mask(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            use_cache=True,
            **{CACHE: cache},
        )
        return outputs.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def additive_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """What is added to the scores of the last `length` tokens: (B, 1, T, S) float32, 0 or the lowest float32.

    transformers would make the same mask. Here it takes few operations, and ONNX has a counterpart for each of them.
    """
    positions = torch.arange(attention_mask.shape[1])  # (S,)
    causal = positions <= positions[-length:, None]  # (T, S)
    visible = causal & attention_mask.bool()[:, None, None]  # (B, 1, T, S)
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def count_parameters(config: NanoGPTConfig) -> int:
    """How many parameters a model of this shape has."""
    with torch.device("meta"):  # no weight is made
        return NanoGPTForCausalLM(config).num_parameters()


def check_size(config: NanoGPTConfig) -> None:
    """Raise ValueError if a model of this shape is too large for an ONNX file."""
    parameters = count_parameters(config)
    if 4 * parameters >= LARGEST:
        raise ValueError(
            f"an ONNX file holds less than 2 GiB, but {parameters:,} parameters take {4 * parameters / 2**30:.1f} GiB "
            "in float32: convert a smaller model, or --to=gguf"
        )


def write_onnx(folder: Path, model: GPT2LMHeadModel, dtype: str) -> None:
    """Write an ONNX file into the folder, under the name that transformers.js has for the dtype.

    `model` is in float32. `dtype` is fp32; fp16, which halves the file; or q8, which stores and multiplies matrices in
    8 bits. In a q8 file the activations are float32. The logits are float32 in all three.
    """
    path = folder / FILES[dtype]
    model.eval().set_attn_implementation("eager")
    with quiet_exporter():
        export(model, path)
        if dtype == "fp16":
            halve(path)
        if dtype == "q8":
            quantize(path)


def export(model: GPT2LMHeadModel, path: Path) -> None:
    """Write the model in float32. Every axis that may differ from call to call has a name."""
    config = model.config
    batch, past, length = 2, 3, 4  # of the example: the exporter would take an axis of length 1 for fixed
    tensors = [f"{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    cache = (batch, config.n_head, past, config.n_embd // config.n_head)
    example = (
        torch.zeros(batch, length, dtype=torch.int64),
        torch.ones(batch, past + length, dtype=torch.int64),
        torch.arange(past, past + length).repeat(batch, 1),
        *[torch.zeros(cache) for _ in tensors],  # the exporter would merge inputs that are one tensor
    )
    # transformers.js makes an empty cache by these names: it knows the batch_size, and other named axes get length 0
    tokens = {0: "batch_size", 1: "sequence_length"}
    cached = {0: "batch_size", 2: "past_sequence_length"}
    torch.onnx.export(
        CachedGPT2(model),
        example,
        path,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in tensors)],
        output_names=["logits", *(f"present.{name}" for name in tensors)],
        dynamic_shapes=(tokens, {0: "batch_size", 1: "total_sequence_length"}, tokens, (cached,) * len(tensors)),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def halve(path: Path) -> None:
    """Turn the weights, the arithmetic and the cache of an ONNX file into float16. The logits stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(path)
    onnx.save(convert_float_to_float16(model, keep_io_types=["logits"], disable_shape_infer=True), path)


def quantize(path: Path) -> None:
    """Turn the matrices of an ONNX file into 8-bit integers, each column with a scale of its own."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # The head is the token embedding, transposed when the model runs. onnxruntime only quantizes matrices that are
    # stored as such, so the first call stores the transposed embedding. The integers are unsigned, because on an x86
    # CPU without VNNI the sum of two products of signed ones overflows.
    quant_pre_process(path, path, skip_symbolic_shape=True)
    quantize_dynamic(path, path, per_channel=True, weight_type=QuantType.QUInt8)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide the exporter's warnings, which are about its own code and about packages that these models do not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
