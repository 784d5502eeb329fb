"""Losses and gradient norms of the steps. They stay on the device until somebody reads them."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from .checkpointing import TrainState


class StepRecord:
    """The results of the optimizer steps since the last reading. Only a reading waits for the device.

    `draw(step)` gives all windows of a step: their offsets say what a skipped step has seen.
    """

    def __init__(self, accelerator: Accelerator, draw: Callable, batch_size: int):
        self._accelerator, self._draw, self._batch_size = accelerator, draw, batch_size
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._last_norm = 0.0
        self.most_in_a_row = 0  # the longest series of skipped steps since this process started

    def add_loss(self, loss: torch.Tensor) -> None:
        """Note the mean loss of a micro-batch, () in nats a token."""
        self._losses.append(loss.detach().clone())  # a CUDA graph writes its next loss into the same memory

    def end_step(self, norm: torch.Tensor) -> torch.Tensor:
        """Note the norm of a step's gradient, (). Returns () 1.0 if the norm is not finite, else 0.0."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 shards even a number
        self._norms.append(norm)
        return (~norm.isfinite()).float()

    def read(self, state: TrainState) -> list[str]:
        """Read the steps since the last reading off the device, into the state. Every process takes part.

        Returns a line for each step that was skipped.
        """
        if not self._norms:
            return []
        losses = torch.stack(self._losses).view(1, len(self._norms), -1)
        losses = self._accelerator.gather(losses).double().cpu()  # (processes, steps, micro-batches)
        norms = torch.stack(self._norms).tolist()
        self._losses, self._norms = [], []
        lines = []
        for i, norm in enumerate(norms):
            of_step = losses[:, i].T  # (micro-batches, processes)
            finite = math.isfinite(norm)
            state.losses.append(of_step.mean().item() if finite else None)
            state.nonfinite = 0 if finite else state.nonfinite + 1
            self.most_in_a_row = max(self.most_in_a_row, state.nonfinite)
            if not finite:
                lines.append(self._explain_skipped(state.step - len(norms) + i, of_step))
        self._last_norm = norms[-1]
        return lines

    def _explain_skipped(self, step: int, losses: torch.Tensor) -> str:
        """What was not finite in a step (counted from 0, as windows are), and on which windows.

        `losses` (micro-batches, processes) of that step. They are all finite if only the gradient overflowed.
        """
        offsets = self._draw(step).offsets.reshape(*losses.shape, self._batch_size)
        bad = ~losses.isfinite().numpy()  # (micro-batches, processes)
        what = "loss" if bad.any() else "gradient"
        starts = (offsets[bad] if bad.any() else offsets).ravel().tolist()
        shown = ", ".join(map(str, starts[:8]))
        if len(starts) > 8:
            shown += ", …"
        places = f"windows at tokens {shown} of train"
        return f"step {step + 1}: the {what} is not finite, and its update is skipped ({places})"

    def summary(self, state: TrainState) -> dict:
        """An entry for the log out of the steps since the last entry: their mean loss, and the last gradient norm.

        A number that is not finite is left out, because JSON cannot hold it.
        """
        losses = [loss for loss in state.losses if loss is not None]
        entry: dict = {"step": state.step}
        if losses:
            entry["loss"] = sum(losses) / len(losses)
        if math.isfinite(self._last_norm):
            entry["grad_norm"] = self._last_norm
        if len(losses) < len(state.losses):
            entry["skipped"] = len(state.losses) - len(losses)
        if self._accelerator.scaler:
            entry["loss_scale"] = self._accelerator.scaler.get_scale()
        state.losses = []
        return entry
