"""Causal attention as matrix products and a softmax, for training in bfloat16 on a CPU.

There, PyTorch's own kernel takes long to go backward. Milliseconds forward and backward, medians of nine turns on two
cores of an AMD EPYC with torch 2.13:

    windows, heads and dimensions      PyTorch's    this function
    8 of 128, 4 of 48                         10                3
    16 of 256, 6 of 64                        52               35
    4 of 512, 6 of 64                         50               29
    2 of 1024, 12 of 64                      125               98
    1 of 2048, 12 of 64                      194              158
"""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Tokens of context up to which the trainer takes this function by itself. It is faster on 2,048 too, but it keeps the
# scores, which then take as much memory as all else that a block keeps.
LONGEST = 1024
SMALLEST_BLOCK = 128  # queries: fewer would not fill a matrix product


def blocks_of(length: int) -> list[tuple[int, int]]:
    """Where each block of queries starts and ends. Four blocks save three eighths of the scores, which look ahead."""
    size = max(SMALLEST_BLOCK, length // 4)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def plain_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention of every token to itself and to those before it.

    query (B, H, T, D), key and value (B, H, S, D): the queries are those of the last T tokens. Returns the output
    (B, T, H, D) and None. If there is a mask, PyTorch's own function does the work. Scores are rounded to the dtype of
    the products; the softmax computes in float32.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    queries, keys, values = (x.flatten(0, 1) for x in (query, key, value))  # (B H, T, D), (B H, S, D)
    cached = key.shape[2] - query.shape[2]
    outputs = []
    with torch.autocast(query.device.type, enabled=False):  # which would make a float32 copy of the scores
        for start, end in blocks_of(query.shape[2]):
            seen = cached + end  # keys up to the last query of the block
            future = queries.new_full((end - start, seen), -torch.inf).triu(cached + start + 1)
            scores = torch.baddbmm(future, queries[:, start:end], keys[:, :seen].mT, alpha=scaling)
            weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout)  # (B H, end - start, seen)
            outputs.append(weights @ values[:, :seen])
    output = torch.cat(outputs, dim=1).unflatten(0, query.shape[:2])  # (B, H, T, D)
    return output.transpose(1, 2).contiguous(), None
