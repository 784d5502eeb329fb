"""Muon: momentum whose matrices are made orthogonal before they are subtracted. One optimizer, AdamW for all else."""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.optim.adamw import adamw

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
)
MOMENTUM = 0.95
MATRIX_RATE = 5.0  # a matrix's rate is that many times AdamW's


def arithmetic_dtype(device: torch.device) -> torch.dtype:
    """What the products are computed in: bfloat16 suffices, and is slow only on a CPU without instructions for it."""
    cpu = torch.cpu.get_capabilities()
    if device.type == "cpu" and not (cpu.get("avx512_bf16") or cpu.get("amx_bf16")):
        return torch.float32
    return torch.bfloat16


def orthogonalize(matrices: torch.Tensor, coefficients: tuple, dtype: torch.dtype) -> torch.Tensor:
    """U f(S) V^T for each matrix U S V^T of a batch (N, R, C) with R <= C, where f(S) is near 1: all directions count.

    Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T, which are products only, on all matrices at
    once. They start at X / |X|, the norm being Frobenius's: no singular value is above 1. Returned in `dtype`. Jordan
    et al., "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon).
    """
    x = matrices.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT  # (N, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (N, R, C)
    return x


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: the blocks' matrices for Muon; for AdamW embeddings and head, which decay, and vectors.

    `parts` is the number of matrices in a weight: the fused projection to q, k and v is three, each by itself.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if ".h." in f".{name}" and p.ndim == 2]
    fused = [p for name, p in matrices if name.endswith("attn.c_attn.weight")]
    single = [p for name, p in matrices if not name.endswith("attn.c_attn.weight")]
    taken = {id(p) for _, p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    return [
        {"params": fused, "weight_decay": weight_decay, "parts": 3},
        {"params": single, "weight_decay": weight_decay, "parts": 1},
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay, "parts": 0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "parts": 0},
    ]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `parts`, AdamW for those without; both decay weights as AdamW does.

    One optimizer, and not one for each, because a gradient scaler would unscale and step each by itself.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], fused: bool = False):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "fused": fused, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices([group for group in self.param_groups if group["parts"]])
        for group in self.param_groups:
            if not group["parts"]:
                self._step_adamw(group)
        return loss

    def _step_adamw(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device if group["fused"] else None)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        means, squares, steps = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            means,
            squares,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, groups: list[dict]) -> None:
        """Update the momentum of every weight, then orthogonalise all matrices of one shape together."""
        batches = defaultdict(list)  # by shape: the weight, its matrices (parts, R, C), the rate and the decay
        for group in groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
            rate = group["lr"] * MATRIX_RATE
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            for p, update in zip(params, updates, strict=True):
                rows, columns = p.shape[0] // group["parts"], p.shape[1]
                matrices = update.view(-1, rows, columns)
                matrices = matrices.mT if rows > columns else matrices
                target = p.view(-1, rows, columns)
                target = target.mT if rows > columns else target
                batches[matrices.shape[1:]].append((target, matrices, rate * math.sqrt(max(1, rows / columns))))
        for batch in batches.values():
            targets, matrices, rates = zip(*batch, strict=True)
            dtype = arithmetic_dtype(targets[0].device)
            together = torch.cat([m.to(dtype) for m in matrices])
            steps = orthogonalize(together, COEFFICIENTS, dtype).split([len(t) for t in targets])
            for target, step, rate in zip(targets, steps, rates, strict=True):
                target.sub_(step, alpha=rate)


def muon(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> Muon:
    """Muon over the blocks' matrices and AdamW over all else, which `betas` belong to."""
    fused = model.device.type in ("cpu", "cuda", "mps")
    return Muon(muon_groups(model, weight_decay), learning_rate, betas, fused)
