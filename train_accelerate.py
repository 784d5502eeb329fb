"""Train a GPT on a text, from top to bottom: the knobs, batches and evaluation, then the run.

    python train_accelerate.py                                                             the quickstart recipe
    accelerate launch train_accelerate.py hub_configs/shakespeare_char.yaml                another recipe
    accelerate launch --num_processes 8 train_accelerate.py RECIPE.yaml --batch_size=8     eight GPUs, and a flag

A recipe is a YAML file of flags, and the command line wins over it. After each save, out_dir holds a complete model.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from command_start import begin_command
from tokenization.arguments import DataArguments, FlagParser, check_bounds, knob, one_line

RECIPES = Path(__file__).parent / "hub_configs"

# ---------------------------------------------------------------------------------------------------------------------
# Knobs. The flags that name the data are in tokenization/arguments.py.


@dataclasses.dataclass
class ModelArguments:
    init_from: str = knob("scratch", "scratch, resume, auto, or a model: a folder, Hub id or ckpt.pt", path=True)
    start_from: str = knob("scratch", "scratch or a model, if init_from is auto and finds no checkpoint", path=True)
    revision: str | None = knob(None, "branch, tag or commit, if init_from is a Hub id (default: main)")
    # the shape: a trained model brings its own; a new model gets these flags, or the defaults in brackets
    block_size: int | None = knob(None, "longest context in tokens (scratch: 1024)")
    n_layer: int | None = knob(None, "number of blocks (scratch: 12)")
    n_head: int | None = knob(None, "attention heads in a block, a divisor of n_embd (scratch: 12)")
    n_embd: int | None = knob(None, "width of the residual stream (scratch: 768)")
    dropout: float | None = knob(None, "dropout probability; 0.1 or more helps on small texts (scratch: 0)")
    bias: bool | None = knob(None, "biases in linear layers and layer norms, as in GPT-2 (scratch: false)")
    activation_function: str | None = knob(None, "gelu, or GPT-2's approximation gelu_new (scratch: gelu)")


@dataclasses.dataclass
class RunArguments:
    # an optimizer step sees gradient_accumulation_steps * batch_size * block_size tokens
    batch_size: int = knob(12, "windows in a micro-batch", at_least=1, heading="batch")
    gradient_accumulation_steps: int = knob(40, "micro-batches in a step, over all processes together", at_least=1)
    auto_batch_size: bool = knob(False, "find the largest micro-batch that fits the GPU; a step stays the same")
    max_iters: int = knob(600_000, "optimizer steps of the whole run", at_least=1, heading="optimizer")
    optimizer: Literal["adamw", "muon"] = knob("adamw", "muon trains the blocks' matrices, AdamW the rest")
    weight_decay: float = knob(0.1, "weight decay of matrices and embeddings")
    muon_weight_decay: float = knob(None, "weight decay of the matrices that Muon trains (default: weight_decay)")
    beta1: float = knob(0.9, "AdamW's decay of the mean of gradients", below=1)
    beta2: float = knob(0.95, "AdamW's decay of the mean of squared gradients", below=1)
    momentum: float = knob(0.95, "Muon's decay of the mean of gradients", below=1)
    momentum_warmup_iters: int = knob(0, "first optimizer steps, in which the momentum rises from 0.85")
    momentum_cooldown_iters: int = knob(0, "last steps of lr_decay_iters, in which the momentum falls to 0.85")
    average_decay: float = knob(0.0, "decay of a mean of the weights, to evaluate and save; 0: no mean", below=1)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 turns clipping off")
    learning_rate: float = knob(6e-4, "peak; beside muon, AdamW has it * 100 / n_embd", heading="learning rate")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob("cosine", "after warmup; wsd decays late")
    decay_fraction: float = knob(0.4, "wsd: last part of lr_decay_iters, in which the rate decays", below=1)
    decay_lr: bool = knob(True, "false: a constant learning rate without warmup")
    warmup_iters: int = knob(2000, "optimizer steps of linear warmup")
    lr_decay_iters: int = knob(None, "optimizer step at which the decay ends (default: max_iters)")
    min_lr: float = knob(None, "learning rate after the decay (default: learning_rate / 10)")
    eval_interval: int = knob(2000, "optimizer steps between evaluations", at_least=1, heading="evaluation and saving")
    eval_tokens: int = knob(0, "tokens evaluated of each split; 0: all of val, and as many of train")
    eval_only: bool = knob(False, "evaluate and stop, without saving")
    log_interval: int = knob(10, "optimizer steps between entries in the log", at_least=1)
    out_dir: str = knob(None, "folder for the model and its checkpoints (default: out/RECIPE)", path=True)
    always_save_checkpoint: bool = knob(True, "save the model after every evaluation; false: if val loss improved")
    patience: int = knob(0, "evaluations without a lower val loss, after which the run stops; 0: it never does")
    save_interval: int = knob(None, "optimizer steps between checkpoints (default: eval_interval)", at_least=1)
    keep_checkpoints: int = knob(2, "newest checkpoints to keep", at_least=1)
    max_nonfinite_steps: int = knob(20, "stop after so many steps in a row without a finite gradient", at_least=1)
    report_to: str = knob("none", "trackers, separated by commas: tensorboard, wandb or any other of Accelerate's")
    push_to_hub: bool = knob(False, "push out_dir to the Hub; needs `hf auth login` or HF_TOKEN", heading="Hub")
    hub_model_id: str | None = knob(None, "repository to push to, or to resume from (default: out_dir's name)")
    hub_private_repo: bool = knob(True, "make a new repository private")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = knob("every_save", "checkpoint: pushes that, too")
    seed: int = knob(1337, "seed of the weights, the windows and dropout", below=2**32, heading="system")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "arithmetic; auto: 16 bits if fast")
    gradient_checkpointing: bool = knob(False, "compute activations twice: less memory, more time")
    compile: bool | Literal["auto"] = knob("auto", "torch.compile; auto: on a GPU, and in a long run on a CPU")
    attn_implementation: str = knob("auto", "sdpa, plain, eager, flex_attention or a Hub kernel; auto: what is fast")
    prepare_only: bool = knob(False, "prepare data_dir and stop")

    def __post_init__(self):  # defaults that depend on other knobs
        self.lr_decay_iters = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        self.muon_weight_decay = self.weight_decay if self.muon_weight_decay is None else self.muon_weight_decay
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        self.save_interval = self.eval_interval if self.save_interval is None else self.save_interval
        self.always_save_checkpoint = self.always_save_checkpoint and not self.patience  # keeps the best model
        if not self.decay_lr:
            self.lr_schedule, self.warmup_iters = "constant", 0
        check_bounds(self)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """The flags of the recipe, then those of the command line, which win. Exits with one line on a mistake."""
    parser = FlagParser([ModelArguments, DataArguments, RunArguments], prog="train_accelerate.py", description=__doc__)
    recipe, flags = parser.read_recipe(argv, default=RECIPES / "quickstart.yaml")
    model_args, data_args, run_args = parser.parse(flags)
    data_args.data_dir = data_args.data_dir or f"data/{recipe.stem}"
    run_args.out_dir = run_args.out_dir or f"out/{recipe.stem}"
    return model_args, data_args, run_args


if __name__ == "__main__":
    # before the imports below, which take seconds: --help and a mistyped flag are answered at once
    begin_command("train_accelerate.py")
    parse_arguments(sys.argv[1:])

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator  # processes, devices, precision

from modeling_nanogpt import NanoGPTForCausalLM, arithmetic
from modeling_nanogpt.optimization import Schedule, momentum_at, optimizer_of, set_rates  # AdamW and Muon
from modeling_nanogpt.sources import adopt_tokenizer
from modeling_nanogpt.training import checkpointing, describing, ending, fitting, launching, monitoring, starting
from modeling_nanogpt.training.averaging import Average  # of the weights over the last steps
from modeling_nanogpt.training.hooks import NO_HOOKS, Hooks  # for tests and experiments
from modeling_nanogpt.training.recording import StepRecord  # losses, left on the device
from modeling_nanogpt.training.saving import Saver, start_saving  # the model and its checkpoints
from modeling_nanogpt.training.signals import Signals, leave_if_asked  # Ctrl-C and SIGTERM stop, SIGUSR1 saves
from tokenization.prepare import prepare  # text becomes tokens on disk
from tokenization.vocabularies import load_tokenizer
from tokenization.windows import TokenStream, Windows, evaluation_windows, training_windows

LOSS_ONLY = {"skip_logits": True, "use_cache": False}  # training needs the loss alone: no logits, no cache

# ---------------------------------------------------------------------------------------------------------------------
# Batches and evaluation


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pinned memory, the copy overlaps the work of the GPU
    return tensor.to(device, non_blocking=True)


def training_batches(
    stream: TokenStream, draw: Callable, first: int, batch_size: int, block_size: int, accelerator: Accelerator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless micro-batches of this process, from the first step on: inputs (B, T), targets (B, T), and a divisor ().

    The divisor is the mean number of targets in the micro-batches of the step, over all processes. If the sum of the
    losses of each micro-batch is divided by it, then every target of the step counts the same. It is a tensor, because
    a compiled model would be compiled again for each new value of a plain number.
    """
    for step in itertools.count(first):
        windows = draw(step)  # of all processes
        mean_targets = np.array(windows.lengths.sum() / (len(windows) // batch_size), dtype=np.float32)
        for mine in windows.shares(batch_size, accelerator.num_processes, accelerator.process_index):
            batch = (*stream.batch(mine, block_size), mean_targets)  # (B, T), (B, T), ()
            inputs, targets, divisor = (to_device(array, accelerator.device) for array in batch)
            yield inputs, targets, divisor


def seed_dropout(seed: int, step: int, process: int) -> None:
    """Dropout depends on nothing but the seed, step and process, so a resumed run draws the same masks."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0]))


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, split: TokenStream, tokens: int, batch_size: int, block_size: int, accelerator: Accelerator
) -> float:
    """Mean loss in nats a token over fixed windows: the same for any batch size and any number of processes."""
    windows = evaluation_windows(len(split), block_size=block_size, tokens=tokens)
    padded = windows.padded(batch_size * accelerator.num_processes)  # so all processes run equally many batches
    model.eval()  # without dropout
    sums = []
    for mine in padded.shares(batch_size, accelerator.num_processes, accelerator.process_index):
        leave_if_asked()  # a signal does not wait for the end of an evaluation
        batch = split.batch(mine, block_size)  # a position without a target has the target -100
        inputs, targets = (to_device(ids, accelerator.device) for ids in batch)
        # the loss is a sum divided by num_items_in_batch, so 1 leaves the sum; a CUDA graph will overwrite the loss
        sums.append(model(inputs, shift_labels=targets, num_items_in_batch=1, **LOSS_ONLY).loss.clone())
    model.train()
    return accelerator.gather(torch.stack(sums)).cpu().double().sum().item() / windows.lengths.sum()


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, hooks: Hooks = NO_HOOKS):
    out_dir, recipe = Path(run_args.out_dir), describing.resolve_recipe(model_args, data_args, run_args)
    saves = not (run_args.eval_only or run_args.prepare_only)  # these two leave out_dir as it is

    # --- Process, start, data: what is wrong with flags, start or text shows here, before training begins ------------
    try:
        trackers = monitoring.choose_trackers(run_args.report_to)
        processes = launching.join_processes(run_args)
        step_windows = fitting.windows_in_step(run_args, processes)
        init_from = starting.choose_start(recipe, out_dir)  # auto is resume, if there is anything to resume
        if init_from == "scratch":
            start = starting.start_from_scratch(recipe)  # new weights
        elif checkpoint := starting.find_checkpoint(init_from, out_dir):
            start = starting.start_from_checkpoint(checkpoint, recipe)  # goes on as if it had never stopped
        else:
            start = starting.start_from_model(init_from, model_args.revision, recipe)  # fine-tuning
        precision = arithmetic.choose_precision(run_args.dtype, start.config, processes.device, start.run)
        accelerator = launching.start_accelerator(precision.value)
        # out_dir may hold an unfinished run, or one that is still at work
        launching.main_first(lambda: starting.check_out_dir(out_dir, start.checkpoint, overwrites=saves))
        model_tokenizer = None
        if start.carries_tokenizer:  # the data must have the tokens that the model knows
            model_tokenizer = load_tokenizer(init_from, "init_from", model_args.revision)
        # the main process prepares the data, then the others find it
        data = launching.main_first(lambda: prepare(data_args, start.config.block_size + 1, model_tokenizer))
        starting.check_data(start, data.record, data.folder)
        if run_args.prepare_only:
            return
        pusher = launching.main_first(lambda: start_saving(run_args, out_dir, accelerator)) if saves else None
    except ValueError as mistake:
        sys.exit(f"train_accelerate.py: error: {one_line(mistake)}")
    config, state = start.config, start.state  # the model's shape, and how far the run has come
    train, val = data.stream("train"), data.stream("val")  # tokens on disk, read without copying

    # --- Model -------------------------------------------------------------------------------------------------------
    torch.manual_seed(run_args.seed)  # for the weights of a new model
    if init_from == "scratch":
        config.vocab_size = math.ceil(len(data.tokenizer) / 64) * 64  # a multiple of 64 is faster
    model = start.model or NanoGPTForCausalLM(config)  # restore() below brings the weights of a checkpoint
    adopt_tokenizer(model, data.tokenizer)  # where texts end, and which ids are only padding
    attention = arithmetic.choose_attention(run_args, config, accelerator.device, precision.value, start.run)
    fitting.set_attention(model, attention.value)
    if run_args.gradient_checkpointing:
        fitting.checkpoint_activations(model)
    model.to(accelerator.device).train()  # weights are float32; autocast lowers the precision of products
    if run_args.auto_batch_size:
        run_args.batch_size = fitting.largest_batch_size(model, step_windows // accelerator.num_processes, accelerator)
        run_args.gradient_accumulation_steps = step_windows // run_args.batch_size

    # --- Optimizer, compile, prepare ---------------------------------------------------------------------------------
    optimizer = optimizer_of(run_args, model)
    compiled = arithmetic.choose_compile(run_args, config, accelerator.device, start.run)
    if compiled.value:  # in place: a wrapper would give the names of the weights a prefix
        model.compile(mode=arithmetic.compile_mode(run_args, config, accelerator), dynamic=False)
    facts = describing.describe_run(run_args, recipe, start, model, data, accelerator, precision, attention, compiled)
    model, optimizer = accelerator.prepare(model, optimizer)  # DDP or FSDP2, autocast, loss scaling
    micro_steps = run_args.gradient_accumulation_steps // accelerator.num_processes
    accelerator.gradient_accumulation_steps = micro_steps  # accelerator.backward divides by it
    average = Average(model, run_args.average_decay)  # does nothing by default
    if start.checkpoint:
        checkpointing.restore(start.checkpoint, state, model, optimizer.optimizer, average, accelerator)

    # --- Log, evaluation, batches, saving ----------------------------------------------------------------------------
    accelerator.print(facts.introduction)
    log = monitoring.Log(accelerator, trackers, facts, state, bar_visible=not run_args.eval_only)
    size = {"batch_size": run_args.batch_size, "block_size": config.block_size, "accelerator": accelerator}

    def evaluate_both() -> bool:  # whether the loss on val is the lowest so far
        hooks.before_evaluation(state.step)  # does nothing outside of tests and experiments
        val_loss = evaluate(model, val, run_args.eval_tokens, **size)
        train_loss = evaluate(model, train, run_args.eval_tokens or len(val), **size)
        return log.evaluation(train_loss=train_loss, val_loss=val_loss)

    def draw(step: int) -> Windows:
        """All windows of a step, whatever the number of processes."""
        flags: dict[str, Any] = {"order": data_args.windows, "seed": run_args.seed, "block_size": config.block_size}
        return training_windows(train, step=step, count=step_windows, **flags)

    if run_args.eval_only:
        with average.in_model():
            evaluate_both()
        log.close()
        accelerator.end_training()  # leaves the group of processes
        return
    batches = training_batches(hooks.training_stream(train, state.step), draw, state.step, **size)
    card = RECIPES / "MODEL_CARD.md"
    saver = Saver(accelerator, model, optimizer.optimizer, average, data.tokenizer, facts, pusher, card)

    # --- The loop: one step is one optimizer update ------------------------------------------------------------------
    schedule, record = Schedule.of(run_args), StepRecord(accelerator, draw, run_args.batch_size)
    clock, signals, failure = monitoring.Clock(state.step), Signals(), ""
    inputs, targets, mean_targets = next(batches)  # (B, T), (B, T), ()
    while True:
        # evaluate on fixed windows, and save the model
        if state.step % run_args.eval_interval == 0 or state.step == run_args.max_iters:
            with clock.paused(), signals.interrupting(), average.in_model():  # tokens a second count training alone
                improved = evaluate_both()
                if state.step > 0 and (improved or run_args.always_save_checkpoint):
                    saver.save_model(state)
        if signals.stop or state.step == run_args.max_iters or state.is_stale(run_args.patience):
            break

        # set the learning rate, and Muon's momentum: functions of the step alone, so nothing to save or to restore
        lr = schedule(state.step)
        set_rates(optimizer, lr=lr, momentum=momentum_at(state.step, run_args))

        # forward, backward, update
        hooks.before_step(state.step)
        seed_dropout(run_args.seed, state.step, accelerator.process_index)
        for _ in range(micro_steps):
            with accelerator.accumulate(model):  # processes exchange gradients only in the last micro-batch
                loss = model(inputs, shift_labels=targets, num_items_in_batch=mean_targets, **LOSS_ONLY).loss
                inputs, targets, mean_targets = next(batches)  # while the device is busy with the forward pass
                accelerator.backward(loss)  # divides by micro_steps, and scales the loss in float16
                record.add_loss(loss)  # stays on the device
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), run_args.grad_clip or math.inf)
                    # A step without a finite gradient must change nothing. If found_inf is 1.0, fused AdamW and Muon
                    # skip the step by themselves, on the device, so the host does not wait for the norm.
                    optimizer.optimizer.found_inf = skip = record.end_step(norm)
                    optimizer.step()
                    average.update(state.step, skip)
                    optimizer.zero_grad(set_to_none=True)  # frees the memory of the gradients
        state.step += 1
        log.advance()

        # log, and save a checkpoint; only a step that does so waits for the device
        signals.poll()  # a signal to one process stops or saves all of them
        log_due = state.step % run_args.log_interval == 0
        save_due = state.step % run_args.save_interval == 0 or state.step == run_args.max_iters
        save_due = save_due or signals.save or signals.stop
        if log_due or save_due:
            log.say(*record.read(state))  # a line for each step that was skipped
            if record.most_in_a_row >= run_args.max_nonfinite_steps:
                failure = f"stopped after {record.most_in_a_row} such steps in a row"
                break
        if log_due:
            log.entry(record.summary(state), lr=lr, steps_per_second=clock.rate(state.step))
        if save_due:
            with clock.paused():
                saver.save_checkpoint(state)
        if signals.stop:
            break

    # --- The end: finished, stopped by a signal, or failed -----------------------------------------------------------
    log.say(*record.read(state))  # the steps before an evaluation that a signal ended
    log.close()  # the bar and the trackers
    signals.restore()
    ending.end_run(accelerator, saver, state, stopped_by=signals.stop, failure=failure)


def run(argv: list[str], hooks: Hooks = NO_HOOKS) -> None:
    """Run main with flags. Ctrl-C before training, and a model that does not fit into memory, end with one line."""
    arguments = parse_arguments(argv)
    with fitting.ended_in_one_line(arguments[2]):
        main(*arguments, hooks=hooks)


if __name__ == "__main__":
    run(sys.argv[1:])
