"""How many parameters a model has, part by part, and how many bytes its training takes at the peak.

The bytes are those of tensors, as eager PyTorch keeps them for this model. They do not include the CUDA process itself
(about half a GiB) and free memory that lies in fragments. A compiled model takes less.
"""

from dataclasses import dataclass

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import LOSS_PART
from .plain_attention import blocks_of

FLOAT = 4  # bytes: weights, gradients, moments, the residual stream and the loss are float32


def parameters_by_part(config: NanoGPTConfig) -> dict[str, int]:
    """The parameters of each part, over all layers, under the names of the weights."""
    assert config.intermediate_size is not None  # a configuration without it sets its default
    width, inner, layers = config.n_embd, config.intermediate_size, config.n_layer
    bias = int(config.bias)
    norm = width * (1 + bias)
    return {
        "wte": config.vocab_size * width,
        "wpe": config.block_size * width,
        "ln_1": layers * norm,
        "attn.c_attn": layers * 3 * width * (width + bias),
        "attn.c_proj": layers * width * (width + bias),
        "ln_2": layers * norm,
        "mlp.c_fc": layers * inner * (width + bias),
        "mlp.c_proj": layers * width * (inner + bias),
        "ln_f": norm,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * width,  # tied: it is wte
    }


def block_matrices(config: NanoGPTConfig) -> dict[tuple[int, int], int]:
    """How many matrices of each shape (the short side first) all blocks hold together.

    c_attn counts as three matrices, of queries, keys and values, as in Muon.
    """
    assert config.intermediate_size is not None
    shapes: dict[tuple[int, int], int] = {}
    width, inner = config.n_embd, config.intermediate_size
    for side, count in ((width, 4 * config.n_layer), (inner, 2 * config.n_layer)):
        shape = (min(width, side), max(width, side))
        shapes[shape] = shapes.get(shape, 0) + count
    return shapes


def optimizer_bytes(config: NanoGPTConfig, optimizer: str) -> int:
    """Bytes of the optimizer's state: two moments for the weights that AdamW trains, one for the matrices of Muon."""
    total = sum(parameters_by_part(config).values())
    if optimizer == "adamw":
        return 2 * FLOAT * total
    matrices = sum(rows * columns * count for (rows, columns), count in block_matrices(config).items())
    return 2 * FLOAT * (total - matrices) + FLOAT * matrices


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device while it trains. `peaks` has the bytes at each time of a step at which the peak may lie."""

    weights: int
    gradients: int
    moments: int  # of the optimizer
    activations: int  # what a forward pass keeps for the backward pass
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def training_memory(
    config: NanoGPTConfig,
    *,
    batch_size: int,
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    gradient_checkpointing: bool = False,
    keeps_gradients: bool = True,
    attention: str = "auto",
) -> TrainingMemory:
    """The memory of a step, with micro-batches of `batch_size` windows of block_size tokens.

    `dtype` is the arithmetic. `keeps_gradients` says that gradients are held during the forward pass: a step has
    several micro-batches, or several processes share their gradients.
    """
    assert config.intermediate_size is not None
    number = FLOAT if dtype == "float32" else 2  # bytes of a number in a matrix product
    lowered = number < FLOAT  # then autocast copies the matrices and the results of the layer norms
    weights = FLOAT * sum(parameters_by_part(config).values())
    moments = optimizer_bytes(config, optimizer)
    fixed = weights + moments
    held_gradients = weights if keeps_gradients else 0

    # Counts of numbers. A tensor of so many numbers takes FLOAT times as many bytes, or `number` times as many.
    tokens = batch_size * config.block_size
    # with checkpointing, the logits of a part of the positions exist at a time
    logit_count = config.vocab_size * (min(tokens, LOSS_PART) if gradient_checkpointing else tokens)
    head_count = config.vocab_size * config.n_embd
    matrix_count = sum(rows * columns * count for (rows, columns), count in block_matrices(config).items())

    # Bytes of activations and of autocast's copies
    stream = FLOAT * tokens * config.n_embd  # the residual stream, (B, T, C)
    narrow = number * tokens * config.n_embd  # (B, T, C) in the dtype of the products
    wide = number * tokens * config.intermediate_size  # inside an MLP
    head_copy = number * head_count if lowered else 0
    logits_copy = number * logit_count if lowered else 0
    block_copies = number * matrix_count if lowered else 0  # the matrices of all blocks

    # What one block keeps: the inputs of both norms; the inputs of four matrices, q, k, v, and the input of the GELU;
    # and for each token two statistics of each norm and one of each attention head.
    block = 2 * stream + 6 * narrow + 2 * wide + FLOAT * tokens * (4 + config.n_head)
    if config.dropout:
        block += 2 * tokens * config.n_embd  # a mask of one byte after each of the two projections
    heads = batch_size * config.n_head
    if attention == "plain":  # the softmax, and dropout's result and mask
        scores = heads * sum((end - start) * end for start, end in blocks_of(config.block_size))
        block += scores * (number + (number + 1 if config.dropout else 0))
    if attention == "eager":  # the softmax in float32, its copy in the dtype of the products, and dropout's mask
        block += heads * config.block_size**2 * (FLOAT + (number if lowered else 0) + (2 if config.dropout else 0))

    # What the forward pass keeps for the backward pass: of the blocks; of the last norm, the head and the loss
    log_probabilities = FLOAT * logit_count
    if gradient_checkpointing:
        kept = config.n_layer * stream
        activations = kept + 2 * stream
    else:
        kept = config.n_layer * block + block_copies
        activations = kept + stream + narrow + head_copy + log_probabilities

    # What exists for a while. The forward pass ends with the logits and their copy in float32, beside the
    # log-probabilities. Autocast keeps its copies until then. The backward pass begins with two gradients of the size
    # of the logits.
    end_of_forward = logits_copy + FLOAT * logit_count
    start_of_backward = 2 * FLOAT * logit_count
    if gradient_checkpointing:
        end_of_forward += log_probabilities + head_copy + block_copies
        # beside the log-probabilities of the part, the gradients of the head: of this part, and of those before it
        start_of_backward += log_probabilities + 2 * head_copy + 2 * FLOAT * head_count
    in_a_block = stream + wide + (narrow if lowered else 0)  # gradients on their way through an MLP
    recomputed = block + block_copies // config.n_layer if gradient_checkpointing else 0
    # A tied embedding has a gradient as the head and another as the table, besides their sum.
    of_embedding = FLOAT * head_count * (2 * int(config.tie_word_embeddings) + int(keeps_gradients))
    peaks = {
        "the loss": fixed + held_gradients + activations + max(end_of_forward, start_of_backward),
        "the last block's backward": fixed + max(held_gradients, FLOAT * head_count) + kept + recomputed + in_a_block,
        "the first block's backward": fixed + weights + kept // config.n_layer + recomputed + in_a_block,
        "the embedding's backward": fixed + weights + of_embedding,
        "the optimizer's step": fixed + weights + (muon_bytes(config) if optimizer == "muon" else 0),
    }
    return TrainingMemory(weights=weights, gradients=weights, moments=moments, activations=activations, peaks=peaks)


def muon_bytes(config: NanoGPTConfig) -> int:
    """Bytes that a step of Muon needs until it ends: the look-ahead momenta and the iteration, both in bfloat16."""
    updates = 0
    iteration = 0
    for (rows, columns), count in block_matrices(config).items():
        updates += 2 * rows * columns * count
        # all matrices of a shape together: their start, their values before and after an iteration, and two squares
        iteration = max(iteration, 2 * count * (3 * rows * columns + 2 * rows * rows))
    return updates + iteration


def largest_batch(bytes_available: float, **settings) -> int:
    """The largest number of windows in a micro-batch whose peak fits; 0 if not even one fits.

    `settings` are the other arguments of training_memory.
    """
    fits, beyond = 0, 1
    while beyond < 2**30 and training_memory(batch_size=beyond, **settings).peak <= bytes_available:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if training_memory(batch_size=middle, **settings).peak <= bytes_available:
            fits = middle
        else:
            beyond = middle
    return fits
