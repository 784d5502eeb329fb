"""The optimizer, and the learning rate and the momentum as pure functions of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import nn

from .modeling_nanogpt import NanoGPTForCausalLM
from .muon import Muon

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # one kernel updates all weights; PyTorch has that kernel for these
ADAMW_RATE = 100.0  # beside Muon, AdamW's learning rate is learning_rate * ADAMW_RATE / n_embd (docs/fast_recipe.md)
LOW_MOMENTUM = 0.85  # at the beginning of a momentum's warmup and at the end of its cooldown


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each optimizer step, counted from 0.

    The rate rises in a line for warmup_iters steps. The first step already learns, at 1 / (warmup_iters + 1) of the
    peak. Then lr_schedule takes the rate down to min_lr, which it reaches at step lr_decay_iters:

        cosine      along half a cosine
        linear      along a line
        wsd         warmup, stable, decay: the peak, then a line over the last decay_fraction of lr_decay_iters
        constant    not at all: the rate stays at the peak
    """

    learning_rate: float  # the peak
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int
    lr_schedule: str = "cosine"
    decay_fraction: float = 0.4

    @classmethod
    def of(cls, flags) -> "Schedule":
        """The schedule that flags of the same names describe."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)})

    def __call__(self, step: int) -> float:
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        if self.lr_schedule == "constant":
            return self.learning_rate
        decay_start: float = self.warmup_iters
        if self.lr_schedule == "wsd":
            decay_start = max(self.warmup_iters, self.lr_decay_iters * (1 - self.decay_fraction))
        if step < decay_start:
            return self.learning_rate
        if step >= self.lr_decay_iters:
            return self.min_lr
        progress = (step - decay_start) / (self.lr_decay_iters - decay_start)  # 0 to 1
        remaining = 1 - progress
        if self.lr_schedule == "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + remaining * (self.learning_rate - self.min_lr)


def momentum_at(step: int, flags) -> float:
    """Muon's momentum at an optimizer step, counted from 0.

    The momentum rises in a line from LOW_MOMENTUM to flags.momentum in the first momentum_warmup_iters steps. It falls
    in a line to LOW_MOMENTUM in the last momentum_cooldown_iters steps before lr_decay_iters. A flags.momentum below
    LOW_MOMENTUM stays as it is. Jordan et al., modded-nanogpt (github.com/KellerJordan/modded-nanogpt).
    """
    low = min(LOW_MOMENTUM, flags.momentum)
    share = 1.0
    if flags.momentum_warmup_iters:
        share = min(share, (step + 1) / flags.momentum_warmup_iters)
    if flags.momentum_cooldown_iters:
        share = min(share, max(0, flags.lr_decay_iters - step) / flags.momentum_cooldown_iters)
    return flags.momentum if share == 1 else low + share * (flags.momentum - low)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, momentum: float) -> None:
    """Set the learning rate, and the momentum of Muon. AdamW has no momentum, and its checkpoints know of none."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "momentum" in group:
            group["momentum"] = momentum


def optimizer_of(flags, model: NanoGPTForCausalLM) -> torch.optim.Optimizer:
    """The optimizer that the flags of the trainer describe."""
    return make_optimizer(
        flags.optimizer,
        model,
        learning_rate=flags.learning_rate,
        betas=(flags.beta1, flags.beta2),
        weight_decay=flags.weight_decay,
        muon_weight_decay=flags.muon_weight_decay,
        momentum=flags.momentum,
    )


def make_optimizer(
    name: str,
    model: NanoGPTForCausalLM,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_weight_decay: float | None = None,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """The optimizer of all weights that train: `adamw`, or `muon` for the blocks' matrices and AdamW for the rest.

    `betas` are AdamW's, `momentum` is Muon's. `weight_decay` is Muon's too, unless Muon has its own. AdamW: Loshchilov
    & Hutter, 1711.05101.
    """
    fused = model.device.type in FUSED_DEVICES
    if name == "muon":
        groups = muon_groups(model, weight_decay, weight_decay if muon_weight_decay is None else muon_weight_decay)
        return Muon(groups, lr=learning_rate, betas=betas, momentum=momentum, fused=fused)
    groups = decay_groups(model.parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and embeddings, which decay; biases and norms, which do not.

    `model.parameters()` names a tied weight once, so the weight is in one group once.
    """
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def muon_groups(model: NanoGPTForCausalLM, weight_decay: float, muon_weight_decay: float) -> list[dict]:
    """Parameter groups for Muon: the blocks' matrices; then, for AdamW, the decay groups of all other weights.

    `muon_weight_decay` is that of the blocks' matrices, and `weight_decay` that of the other weights that decay.

    `parts` is how many matrices a weight holds: three in the fused projection to q, k and v. 0 leaves it to AdamW.
    `rate` multiplies the learning rate. A step of Muon has the same norm at any width, so its matrices have 1. A step
    of AdamW has the same size in every number, and a logit sums n_embd of them, so AdamW's rate falls as 1 / n_embd
    (Yang et al., "Tensor Programs V", 2203.03466).
    """
    fused, single, rest = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not (name.startswith("transformer.h.") and p.ndim == 2):
            rest.append(p)
        elif name.endswith(".c_attn.weight"):
            fused.append(p)
        else:
            single.append(p)
    adamw = {"parts": 0, "rate": ADAMW_RATE / model.config.n_embd}
    return [
        {"params": fused, "weight_decay": muon_weight_decay, "parts": 3},
        {"params": single, "weight_decay": muon_weight_decay, "parts": 1},
        *(group | adamw for group in decay_groups(rest, weight_decay)),
    ]
