"""Tiny models, and tokens for them."""

import torch

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM

VOCAB, BLOCK = 61, 32


def make_config(**changes):
    # Weights much larger than those of a trained model: attention is far from uniform, so that a wrong mask, a
    # lost cache or a shifted position changes the logits by far more than any tolerance below.
    return NanoGPTConfig(
        **{"vocab_size": VOCAB, "block_size": BLOCK, "n_layer": 2, "n_head": 2, "n_embd": 32, "initializer_range": 0.3}
        | changes
    )


def make_model(cls=NanoGPTForCausalLM, seed=0, attention="sdpa", **changes):
    """A tiny model in eval mode. Its biases and norms are not the zeros and ones of a new model."""
    torch.manual_seed(seed)
    model = cls(make_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(attention)
    return model


def make_tokens(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))
