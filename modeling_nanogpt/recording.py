"""Losses and gradient norms of the steps, left on the device until somebody looks."""

import math

import numpy as np
import torch
from accelerate import Accelerator

from .checkpointing import TrainState


class StepRecord:
    """What the optimizer steps since the last look came to; looking is the one time that waits for the device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._losses, self._norms, self._norm = [], [], 0.0
        self.most_in_a_row = 0  # skipped steps, since the run started

    def add_loss(self, loss: torch.Tensor) -> None:
        """A micro-batch's mean loss, () in nats a token."""
        self._losses.append(loss.detach())

    def end_step(self, norm: torch.Tensor) -> torch.Tensor:
        """Note the gradient's norm, (), with which a step ends; returns () 1.0 where it is not finite, else 0.0."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 shards even a number
        self._norms.append(norm)
        return (~norm.isfinite()).float()

    def look(self, state: TrainState) -> list[tuple[int, list]]:
        """Read the steps since the last look off the device into the state; every process takes part.

        Returns the steps that were skipped, each with the places (micro-batch, process) of the losses that were not
        finite; none of them were where the gradient alone overflowed. Steps count from 0 here, as windows do.
        """
        if not self._norms:
            return []
        table = torch.stack(self._losses).view(1, len(self._norms), -1)
        table = self._accelerator.gather(table).double().cpu()  # (processes, steps, micro-batches)
        norms = torch.stack(self._norms).tolist()
        self._losses, self._norms = [], []
        skipped = []
        for i, norm in enumerate(norms):
            losses = table[:, i].T  # (micro-batches, processes)
            finite = math.isfinite(norm)
            state.losses.append(losses.mean().item() if finite else None)
            state.nonfinite = 0 if finite else state.nonfinite + 1
            self.most_in_a_row = max(self.most_in_a_row, state.nonfinite)
            if not finite:
                skipped.append((state.step - len(norms) + i, (~losses.isfinite()).nonzero().tolist()))
        self._norm = norms[-1]
        return skipped

    def summary(self, state: TrainState) -> dict:
        """An entry for the history out of the steps since the last one: their mean loss, the last gradient norm.

        What is not finite is left out, as JSON has no such number.
        """
        losses = [loss for loss in state.losses if loss is not None]
        entry = {"step": state.step}
        if losses:
            entry["loss"] = sum(losses) / len(losses)
        if math.isfinite(self._norm):
            entry["grad_norm"] = self._norm
        if len(losses) < len(state.losses):
            entry["skipped"] = len(state.losses) - len(losses)
        if self._accelerator.scaler:
            entry["loss_scale"] = self._accelerator.scaler.get_scale()
        state.losses = []
        return entry


def name_skipped(step: int, micro_batches: list, offsets: np.ndarray) -> str:
    """A line about a skipped step: what was not finite, and on which windows.

    `offsets` (micro-batches, processes, B) are where the windows of the step start, `micro_batches` the places in it
    whose loss was not finite.
    """
    what = "loss" if micro_batches else "gradient"
    places = [offsets[micro_batch, process] for micro_batch, process in micro_batches] or [offsets.ravel()]
    starts = np.concatenate(places).tolist()
    shown = ", ".join(map(str, starts[:8])) + ", …" * (len(starts) > 8)
    return f"step {step + 1}: the {what} is not finite, and its update is skipped (windows at tokens {shown} of train)"
