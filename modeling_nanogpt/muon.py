"""Muon for the blocks' matrices and AdamW for all else, as one optimizer."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

from .distributed import cut, gather, machine_group, shard_of, share

# One (a, b, c) for each iteration: the quintic nearest to 1 over the range to which the previous iteration maps the
# singular values (one per cent wider, for rounding), as in Amsel et al., "The Polar Express" (2505.16932). A singular
# value between 0.002 and 1 ends within 0.34 of 1.
COEFFICIENTS = (
    (8.3442, -24.2061, 17.5975),
    (4.0744, -2.9722, 0.5476),
    (3.6936, -2.7094, 0.5186),
    (2.7900, -2.0467, 0.4465),
)


@functools.cache
def arithmetic_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the matrix products: bfloat16 is precise enough, but slow on hardware that only emulates it."""
    if device.type == "cpu":
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16")
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def orthogonalize(matrices: torch.Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """About U V^T for each matrix U S V^T of a batch (N, R, C), R <= C: a step of one size in every direction.

    A Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T changes only the singular values. It consists
    of matrix products, so it runs over the whole batch at once. The first X is divided by its Frobenius norm, so that
    no singular value is above 1. Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
    (kellerjordan.github.io/posts/muon).
    """
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT  # (N, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def as_matrices(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """A view (parts, R, C) of the matrices that a weight stacks. Tall matrices are transposed, so that R <= C."""
    matrices = weight.unflatten(0, (parts, -1))
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


def as_weight(matrices: torch.Tensor, rows: int) -> torch.Tensor:
    """The weight whose matrices these are: as_matrices, turned round. `rows` are those of one matrix."""
    return (matrices if matrices.shape[1] == rows else matrices.mT).flatten(0, 1)


def gradients_of(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of parameters that all have one."""
    return [p.grad for p in params if p.grad is not None]


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose `parts` is not 0, and AdamW for the others. Both decouple weight decay.

    With momentum m, gradient G and M <- m M + (1 - m) G, the step of a matrix W (rows, columns) is torch.optim.Muon's:

        W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(m M + (1 - m) G)

    Here lr is the group's learning rate times its `rate`.

    This is one optimizer, because a gradient scaler treats each optimizer apart: with two, it could skip the step of
    one and not of the other. As in fused AdamW, the attribute `found_inf`, a tensor that is 1.0 or 0.0, turns a step
    into one that changes nothing, and the host does not wait for the device to know.

    If several processes train together, each one on a machine orthogonalises an equal part of the matrices, and then
    they exchange the results. Weights that FSDP2 has sharded are updated as whole ones: every process gathers the
    look-aheads of all matrices, and in the end subtracts its own shard. Apart from rounding, the weights do not depend
    on the number of processes. Every process must take each step, with gradients for the same parameters.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], momentum: float, fused: bool = False
    ):
        defaults = {"lr": lr, "rate": 1.0, "betas": betas, "eps": 1e-8, "fused": fused, "momentum": momentum}
        super().__init__(groups, defaults)

    @functools.cached_property
    def machine(self) -> torch.distributed.ProcessGroup | None:
        """The processes that share the orthogonalisation."""
        return machine_group()

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. `closure` is there because callers pass None."""
        assert closure is None
        skip = getattr(self, "found_inf", None)  # () 1.0 or 0.0, on the device
        batches = defaultdict(list)  # shape -> matrices of this shape, from any weight
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["parts"]:
                self._step_adamw(params, group, skip)
                continue
            for p, update in zip(params, self._momentum(params, group["momentum"], skip), strict=True):
                # rounded first, so that processes send half as many bytes
                whole = gather(update.to(arithmetic_dtype(p.device)), like=p)
                matrices = as_matrices(whole, group["parts"])
                batches[matrices.shape[1:]].append((p, matrices, group))
        for batch in batches.values():
            params, updates, groups = zip(*batch, strict=True)
            self._step_matrices(params, updates, groups, skip)

    def _momentum(
        self, params: list[nn.Parameter], momentum: float, skip: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Blend the gradients into the momenta. Returns Nesterov's look-ahead, for the shards of this process."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        if not params:
            return ()
        gradients = [shard_of(gradient) for gradient in gradients_of(params)]
        momenta = [shard_of(self.state[p]["momentum"]) for p in params]
        if skip is None:
            torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        else:  # a skipped step multiplies the gradients by 0, but nan * 0 is nan: so replace nan first
            gradients = [gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients]
            torch._foreach_lerp_(momenta, gradients, [(1 - skip) * (1 - momentum)] * len(momenta))
        return torch._foreach_lerp(gradients, momenta, momentum)

    def _step_matrices(self, params: list, updates: list, groups: list, skip: torch.Tensor | None) -> None:
        """Orthogonalise the updates (parts, R, C) of several weights in one batch, and subtract them."""
        together = torch.cat(updates)  # (N, R, C)
        keep: torch.Tensor | float = 1.0
        if skip is not None:
            keep = 1 - skip  # 0.0 leaves every weight as it is
            together.mul_(keep)
        steps = share(lambda batch: orthogonalize(batch, COEFFICIENTS), together, self.machine)
        for p, step, group in zip(params, steps.split([len(each) for each in updates]), groups, strict=True):
            rate = group["lr"] * group["rate"]
            rows, columns = p.shape[0] // group["parts"], p.shape[1]
            shard_of(p).mul_(1 - rate * group["weight_decay"] * keep)
            scale = rate * math.sqrt(max(1, rows / columns))
            whole = as_weight(step, rows)
            shard_of(p).sub_(cut(whole, like=p), alpha=scale)

    def _step_adamw(self, params: list[torch.Tensor], group: dict, skip: torch.Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads=gradients_of(params),
            exp_avgs=[self.state[p]["exp_avg"] for p in params],
            exp_avg_sqs=[self.state[p]["exp_avg_sq"] for p in params],
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]["step"] for p in params],
            lr=group["lr"] * group["rate"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            fused=group["fused"],
            found_inf=skip,
            amsgrad=False,
            maximize=False,
        )
