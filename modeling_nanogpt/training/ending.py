"""How a run ended: it finished, a signal stopped it, or it failed."""

import math
import sys

from accelerate import Accelerator

from .checkpointing import TrainState, newest_complete
from .holding import let_go
from .saving import Saver


def end_run(accelerator: Accelerator, saver: Saver, state: TrainState, *, stopped_by: int, failure: str) -> None:
    """Say how the run ended, and leave together. Exits with a status unless the run finished.

    `stopped_by` is the number of the signal that stopped the run, or 0. `failure` says why training failed, if it did.
    """
    out_dir, pusher = saver.out_dir, saver.pusher
    if stopped_by and state.step > 0 and saver.saved_step != state.step:  # the signal came during an evaluation
        saver.save_checkpoint(state)
    if failure:
        failure += f"; the last good checkpoint: {newest_complete(out_dir) or 'none yet'}"
    val_loss = next((entry["val_loss"] for entry in reversed(state.history) if "val_loss" in entry), math.nan)
    if not failure and not stopped_by and not math.isfinite(val_loss):
        failure = f"training has diverged (val loss {val_loss}): lower --learning_rate, or set --grad_clip=1"
    failure = failure or saver.failure
    if not failure and stopped_by:
        goes_on = "--init_from=resume goes on from there" if state.step > 0 else "nothing was trained yet"
        accelerator.print(f"stopped by a signal after step {state.step}; {goes_on}")
    if not failure and not stopped_by:
        if state.step < saver.facts.recipe["max_iters"]:
            accelerator.print(f"stopped at step {state.step}: {state.stale} evaluations without a lower val loss")
        accelerator.print(f"best val loss {state.best_val_loss:.4f}; the model is in {out_dir}")
    # Wait for the last save. A process that left at once could also hang in the destructor of gloo, which holds the
    # GIL while one of its threads still needs the GIL to free the last gathered tensor.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if pusher:  # at the very end, because a push may take longer than processes wait for each other
        pusher.finish(f"step {state.step}: stopped" if stopped_by else None)
    let_go(out_dir)
    if failure:
        sys.exit(f"train_accelerate.py: error: {failure}")
    if stopped_by:
        sys.exit(128 + stopped_by)
