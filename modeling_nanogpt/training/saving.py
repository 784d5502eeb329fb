"""Saving during a run: the model into out_dir, and the checkpoints from which the run goes on."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm  # what tqdm writes does not run into a bar
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..modeling_nanogpt import NanoGPTForCausalLM
from ..sources import first_line
from .atomic import files_written_aside
from .averaging import Average
from .checkpointing import TrainState, gather_tensors, save_checkpoint
from .describing import RunFacts
from .holding import hold
from .hub import Pusher, start_pusher
from .report import Report, draw_samples, find_commit, in_one_line
from .starting import superseded_by


def start_saving(flags, out_dir: Path, accelerator: Accelerator) -> Pusher | None:
    """Start the pusher, if there is to be one, and hold out_dir against other runs. Raises ValueError if one fails."""
    pusher = start_pusher(flags, out_dir, accelerator)
    hold(out_dir)  # makes the folder, so this comes after what the Hub may refuse
    return pusher


class Saver:
    """Saves the model and the checkpoints of a run. A save that fails is reported, and the next save makes up for it.

    If there is a `pusher`, it pushes what was saved. `card` is the template of the model card. The first save of
    a checkpoint removes the old ones that this run supersedes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average,
        tokenizer: PreTrainedTokenizerBase,
        facts: RunFacts,
        pusher: Pusher | None,
        card: Path,
    ):
        self.accelerator, self.model, self.optimizer, self.tokenizer = accelerator, model, optimizer, tokenizer
        self.average = average
        self.facts, self.out_dir, self.pusher = facts, facts.out_dir, pusher
        self.superseded = superseded_by(facts.out_dir, facts.resumed_from)
        self.report = Report(
            facts,
            template=card.read_text(encoding="utf-8"),
            name=pusher.model_id if pusher else facts.out_dir.name,
            commit=find_commit(),
        )
        self.saved_step = -1  # of the last checkpoint
        self._failures: dict[str, str] = {}
        disable_progress_bar()  # transformers draws a bar at each save, but the only bar here is the loop's

    @property
    def failure(self) -> str:
        """What could not be saved, and why. Empty if the last save of everything went well."""
        return "; ".join(f"{what} could not be saved ({reason})" for what, reason in self._failures.items())

    def save_model(self, state: TrainState) -> None:
        """Make out_dir a complete model repository, and have it pushed. Every process takes part."""
        weights = self.accelerator.get_state_dict(self.model)
        samples = draw_samples(self.accelerator.unwrap_model(self.model), self.tokenizer)
        if samples:
            state.samples.append({"step": state.step, "text": samples[0]})
        if self.accelerator.is_main_process:
            if samples:
                tqdm.write(f"step {state.step}: sample: {in_one_line(samples[0])}")
                sys.stdout.flush()  # so that the log file of a killed run holds the line
            self._attempt("the model", lambda: self._write_model(state, weights, samples))

    def _write_model(self, state: TrainState, weights: dict[str, torch.Tensor], samples: list[str]) -> None:
        with files_written_aside(self.out_dir) as folder:
            save_gathered(folder, self.accelerator.unwrap_model(self.model), weights)
            self.tokenizer.save_pretrained(folder)
            self.report.write(folder, state, samples, earlier=self.out_dir / "README.md")
        if self.pusher:
            self.pusher.saved(f"step {state.step}: val loss {state.history[-1]['val_loss']:.4f}")

    def save_checkpoint(self, state: TrainState) -> None:
        """Write the checkpoint of this step. Every process takes part."""
        self.saved_step = state.step
        tensors = gather_tensors(self.model, self.optimizer, self.average)
        state.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        if self.accelerator.is_main_process:
            self._attempt(
                "the checkpoint",
                lambda: save_checkpoint(
                    self.out_dir,
                    state,
                    tensors,
                    run=self.facts.identity,
                    keep=self.facts.recipe["keep_checkpoints"],
                    superseded=self.superseded,
                ),
            )

    def _attempt(self, what: str, save: Callable[[], None]) -> None:
        try:
            save()
            self._failures.pop(what, None)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is how torch says that a disk is full
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = self._failures[what] = first_line(cause)
            tqdm.write(f"{what} could not be saved ({reason}): the next save tries again", file=sys.stderr)


def save_gathered(folder: Path, model: NanoGPTForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Save weights that were gathered from all processes, as save_pretrained would have before training began.

    FSDP2 replaces the model's class by one of its own, whose code would be saved, and it unties the weights, which
    would be saved twice.
    """
    with torch.device("meta"):
        plain = NanoGPTForCausalLM(model.config)
    plain.generation_config = model.generation_config
    tied = plain.all_tied_weights_keys
    plain.save_pretrained(folder, state_dict={name: each for name, each in weights.items() if name not in tied})
