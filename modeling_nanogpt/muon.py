"""Muon for the blocks' matrices and AdamW for all else, as one optimizer."""

import functools
import math
from collections import defaultdict

import torch
from torch import nn
from torch.optim.adamw import adamw

# One (a, b, c) for each iteration: the quintic nearest to 1 where the one before has put the singular values (and one
# per cent above, for rounding), as in Amsel et al., "The Polar Express" (2505.16932). Those between 0.002 and 1 end
# within 0.34 of 1.
COEFFICIENTS = (
    (8.3442, -24.2061, 17.5975),
    (4.0744, -2.9722, 0.5476),
    (3.6936, -2.7094, 0.5186),
    (2.7900, -2.0467, 0.4465),
)


@functools.cache
def arithmetic_dtype(device: torch.device) -> torch.dtype:
    """What the products are computed in: bfloat16 is enough, but slow where it is not in the hardware."""
    if device.type == "cpu":
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16")
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def orthogonalize(matrices: torch.Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """About U V^T for each matrix U S V^T of a batch (N, R, C), R <= C: the same step in all its directions.

    Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T act on the singular values alone, and are
    products alone: each runs over the whole batch at once. They start at X / |X|, Frobenius's norm, where no singular
    value is above 1. Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
    (kellerjordan.github.io/posts/muon).
    """
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT  # (N, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def as_matrices(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """A view of a weight as the matrices that it holds one above the other, each lying: (parts, R, C), R <= C."""
    matrices = weight.unflatten(0, (parts, -1))
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose `parts` is not 0, AdamW for the others; decay is decoupled in both.

    With momentum m and M <- m M + (1 - m) G, a matrix (rows, columns) takes, at the learning rate lr, the step

        W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(m M + (1 - m) G)

    as torch.optim.Muon does; lr is the group's times its `rate`. One optimizer rather than one of each: a gradient
    scaler would unscale and skip each by itself. As in fused AdamW, a tensor `found_inf` of 1.0 makes a step one that
    changes nothing, and the host need not wait to know. Weights cut up among processes (DTensor) are refused with a
    ValueError.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], momentum: float, fused: bool = False
    ):
        defaults = {"lr": lr, "rate": 1.0, "betas": betas, "eps": 1e-8, "fused": fused, "momentum": momentum}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, "found_inf", None)  # () 1.0 or 0.0, on the device
        batches = defaultdict(list)  # matrices of one shape, whichever weights they are of
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["parts"]:
                self._step_adamw(params, group, skip)
                continue
            for p, update in zip(params, self._momentum(params, group["momentum"], skip), strict=True):
                matrices = as_matrices(update, group["parts"])
                batches[matrices.shape[1:]].append((p, matrices, group))
        for batch in batches.values():
            self._step_matrices(*zip(*batch, strict=True), skip)
        return loss

    def _momentum(self, params: list[nn.Parameter], momentum: float, skip: torch.Tensor | None) -> list[torch.Tensor]:
        """Take the gradients into the momenta; returns Nesterov's look ahead, of the shapes of the parameters."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        if not params:
            return []
        gradients, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        if skip is None:
            torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        else:  # weighed with zero where the step is to change nothing, which nan would survive
            gradients = [gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients]
            torch._foreach_lerp_(momenta, gradients, [(1 - skip) * (1 - momentum)] * len(momenta))
        return torch._foreach_lerp(gradients, momenta, momentum)

    def _step_matrices(self, params: list, updates: list, groups: list, skip: torch.Tensor | None) -> None:
        """Orthogonalise the updates (parts, R, C) of weights together, and subtract them."""
        dtype = arithmetic_dtype(params[0].device)
        together = torch.cat([matrices.to(dtype) for matrices in updates])  # (N, R, C)
        keep = 1.0
        if skip is not None:
            keep = 1 - skip
            together.mul_(keep)
        steps = orthogonalize(together, COEFFICIENTS).split([len(matrices) for matrices in updates])
        for p, step, group in zip(params, steps, groups, strict=True):
            rate = group["lr"] * group["rate"]
            rows, columns = p.shape[0] // group["parts"], p.shape[1]
            p.mul_(1 - rate * group["weight_decay"] * keep)
            as_matrices(p, group["parts"]).sub_(step, alpha=rate * math.sqrt(max(1, rows / columns)))

    def _step_adamw(self, params: list[nn.Parameter], group: dict, skip: torch.Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        gradients = [p.grad for p in params]
        means, squares, steps = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        options = {key: group[key] for key in ("weight_decay", "eps", "fused")} | {"lr": group["lr"] * group["rate"]}
        options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "found_inf": skip}
        adamw(params, gradients, means, squares, [], steps, **options)
