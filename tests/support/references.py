"""A GPT written here from its definitions, as a reference for the project's GPT.

Weights are a dict of plain tensors under the model's names. The head has no entry, because it is the token embedding.
"""

import math

import torch

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM

VOCAB, BLOCK, LAYERS, HEADS, WIDTH = 53, 16, 2, 4, 32


def linear(x, weights, name):
    """x W^T + b, as the weight is stored (out, in)."""
    y = torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(x, weights, name, epsilon=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + epsilon) * weights[f"{name}.weight"]
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, weights, name):
    """Attention, head by head: softmax of q k / sqrt(D) over the past, applied to v."""
    q, k, v = linear(x, weights, f"{name}.c_attn").chunk(3, dim=-1)
    past, size, heads = torch.ones(x.shape[1], x.shape[1]).tril().bool(), WIDTH // HEADS, []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        scores = q[..., own] @ k[..., own].transpose(-1, -2) / math.sqrt(size)
        heads.append(torch.softmax(torch.where(past, scores, -math.inf), dim=-1) @ v[..., own])
    return linear(torch.cat(heads, dim=-1), weights, f"{name}.c_proj")


def reference_logits(weights, tokens, gelu):
    embedding = weights["transformer.wte.weight"]
    x = embedding[tokens] + weights["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        x = x + attention(layer_norm(x, weights, f"{block}.ln_1"), weights, f"{block}.attn")
        inner = gelu(linear(layer_norm(x, weights, f"{block}.ln_2"), weights, f"{block}.mlp.c_fc"))
        x = x + linear(inner, weights, f"{block}.mlp.c_proj")
    return layer_norm(x, weights, "transformer.ln_f") @ embedding.T


def make_counterpart(bias, activation="gelu"):
    """The project's model of the same shape. Its attention is far from uniform, and no bias or norm is 0 or 1."""
    torch.manual_seed(0)
    config = NanoGPTConfig(
        vocab_size=VOCAB,
        block_size=BLOCK,
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        bias=bias,
        activation_function=activation,
        initializer_range=0.2,
    )
    model = NanoGPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()
