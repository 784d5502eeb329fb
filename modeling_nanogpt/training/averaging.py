"""An average of the weights over the last steps, which is evaluated and saved in place of the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from ..distributed import shard_of


class Average:
    """The exponential moving average of a model's weights, held beside the model in float32.

    After step n, counted from 1, the average A of the weights W becomes A + s (W - A) with s = max(1 - decay, 1 / n).
    So A is the mean of all steps as long as they are fewer than 1 / (1 - decay). Later, A forgets: a step counts a
    third after 1 / (1 - decay) further steps. Training goes on from the weights, and does not know of the average.
    With a decay of 0 there is no average, and the methods do nothing. Polyak & Juditsky, "Acceleration of stochastic
    approximation by averaging" (SIAM Journal on Control and Optimization 30).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = model, decay
        self._averages = [weight.clone() for weight in self._weights()]

    @torch.no_grad()
    def update(self, step: int, skip: torch.Tensor) -> None:
        """Take in the weights after a step, counted from 0. `skip`, () 1.0 or 0.0, leaves the average as it is."""
        if self.decay:
            share = (1 - skip) * max(1 - self.decay, 1 / (step + 1))  # on the device: the host does not wait
            torch._foreach_lerp_(self._averages, self._weights(), [share] * len(self._averages))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """A context in which the model has the average as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def begin_at_weights(self) -> None:
        """Make the average the model's weights of now."""
        for average, weight in zip(self._averages, self._weights(), strict=True):
            average.copy_(weight)

    def _weights(self) -> list[torch.Tensor]:
        """What this process holds of the model's weights, or an empty list if there is no average."""
        if not self.decay:
            return []
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass, FSDP2 may still hold whole weights instead
        return [shard_of(weight.detach()) for weight in self.model.parameters()]

    def _swap(self) -> None:
        for average, weight in zip(self._averages, self._weights(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
