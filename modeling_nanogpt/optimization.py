"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from .muon import muon


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and embeddings, which decay, and biases and norms, which do not.

    A tied weight is one parameter, and counts once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the decay groups, in one fused kernel where the device has one (Loshchilov & Hutter, 1711.05101)."""
    fused = model.device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=fused)


def make_optimizer(name: str, model: nn.Module, *settings, momentum: float) -> torch.optim.Optimizer:
    """adamw or muon, by that name, over the model's parameters; the settings are theirs, momentum is Muon's."""
    return muon(model, *settings, momentum) if name == "muon" else adamw(model, *settings)


def learning_rate_at(
    step: int,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    lr_schedule: str = "cosine",
    decay_fraction: float = 0.4,
) -> float:
    """Linear warmup over warmup_iters optimizer steps, then the schedule, down to min_lr at lr_decay_iters.

    cosine is half a cosine, linear a straight line; wsd (warmup, stable, decay) stays at the top until the last
    decay_fraction of lr_decay_iters, and is a line from there; constant never leaves the top. Steps count from 0, and
    the first one already moves: it has 1 / (warmup_iters + 1) of the full rate.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    start = {"constant": math.inf, "wsd": lr_decay_iters * (1 - decay_fraction)}.get(lr_schedule, warmup_iters)
    start = max(start, warmup_iters)
    if step < start:
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - start) / (lr_decay_iters - start)  # 0 to 1
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if lr_schedule == "cosine" else 1 - progress
    return min_lr + remaining * (learning_rate - min_lr)
