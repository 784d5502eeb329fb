"""Train a GPT on a text, from top to bottom: knobs, batches, model, optimizer, loop.

    python train_accelerate.py                                                             the quickstart recipe
    accelerate launch train_accelerate.py hub_configs/shakespeare_char.yaml                another recipe
    accelerate launch --num_processes 8 train_accelerate.py RECIPE.yaml --batch_size=8     eight GPUs, and a flag

A recipe is a YAML file of flags, one `key: value` a line; the command line wins over it. After each save, out_dir
holds the model with all that loading it and repeating the run need.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils.logging import disable_progress_bar

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt import checkpointing as checkpoints
from modeling_nanogpt.fitting import explain_out_of_memory, largest_batch_size
from modeling_nanogpt.launching import describe, start_accelerator
from modeling_nanogpt.optimization import adamw, learning_rate_at
from modeling_nanogpt.publishing import write_report
from modeling_nanogpt.recording import StepRecord, name_skipped
from modeling_nanogpt.signals import Signals
from modeling_nanogpt.sources import check_given, choose_config, find_ckpt, know_tokens, load_model
from modeling_nanogpt.throughput import flops_per_token, peak_flops
from modeling_nanogpt.tracking import Trackers, choose_trackers
from tokenization.arguments import DataArguments, FlagParser, knob
from tokenization.prepare import load_tokenizer, prepare
from tokenization.windows import TokenStream, evaluation_offsets, open_stream, training_offsets

RECIPES = Path(__file__).parent / "hub_configs"

# ---------------------------------------------------------------------------------------------------------------------
# Knobs. What text to train on is in tokenization/arguments.py.


@dataclasses.dataclass
class ModelArguments:
    init_from: str = knob("scratch", "scratch, resume, or a model: a folder, Hub id or nanoGPT's ckpt.pt")
    block_size: int | None = knob(None, "longest context, tokens (scratch: 1024)")
    n_layer: int | None = knob(None, "blocks (scratch: 12)")
    n_head: int | None = knob(None, "attention heads, a divisor of n_embd (scratch: 12)")
    n_embd: int | None = knob(None, "width (scratch: 768)")
    dropout: float | None = knob(None, "probability; 0.1 and more help where the text is small (scratch: 0)")
    bias: bool | None = knob(None, "biases in linear layers and layer norms, as GPT-2 has them (scratch: false)")
    activation_function: str | None = knob(None, "gelu, or gelu_new, GPT-2's approximation of it (scratch: gelu)")

    def shape(self) -> dict:
        """What is given of NanoGPTConfig's keys."""
        return {key: value for key, value in vars(self).items() if key != "init_from" and value is not None}


@dataclasses.dataclass
class RunArguments:
    out_dir: str | None = knob(None, "where the model is saved (default: out/RECIPE)")
    # batch: one optimizer step sees gradient_accumulation_steps * batch_size * block_size tokens
    batch_size: int = knob(12, "windows in a micro-batch")
    gradient_accumulation_steps: int = knob(40, "micro-batches in an optimizer step, over all processes together")
    # AdamW
    learning_rate: float = knob(6e-4, "the highest learning rate")
    max_iters: int = knob(600_000, "optimizer steps in all")
    weight_decay: float = knob(0.1, "of matrices and embeddings")
    beta1: float = knob(0.9, "decay of the mean of gradients")
    beta2: float = knob(0.95, "decay of the mean of their squares")
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 clips nothing")
    # learning rate
    decay_lr: bool = knob(True, "warmup and cosine decay; otherwise the learning rate is constant")
    warmup_iters: int = knob(2000, "optimizer steps of linear warmup")
    lr_decay_iters: int | None = knob(None, "optimizer step at which the decay ends (default: max_iters)")
    min_lr: float | None = knob(None, "where the decay ends (default: learning_rate / 10)")
    # evaluation, logging, saving
    eval_interval: int = knob(2000, "optimizer steps between evaluations")
    eval_tokens: int = knob(0, "tokens evaluated of each split; 0: all of val, and as many of train")
    log_interval: int = knob(10, "optimizer steps between entries in the log")
    always_save_checkpoint: bool = knob(True, "save after each evaluation; otherwise only where val loss is the best")
    save_interval: int | None = knob(None, "optimizer steps between checkpoints (default: eval_interval)")
    keep_checkpoints: int = knob(2, "checkpoints that are kept, the newest")
    max_nonfinite_steps: int = knob(20, "stop after as many steps in a row whose loss or gradient is not finite")
    report_to: str = knob("none", "trackers, separated by commas: tensorboard, wandb or any other of Accelerate's")
    eval_only: bool = knob(False, "evaluate and stop; nothing is saved")
    prepare_only: bool = knob(False, "stop once data_dir is there")
    # system
    seed: int = knob(1337, "of the weights, the windows and dropout")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "of the arithmetic; weights are float32")
    gradient_checkpointing: bool = knob(False, "compute activations twice, not keep them: less memory, slower")
    auto_batch_size: bool = knob(False, "find the largest micro-batch that fits the GPU; a step stays the same")
    compile: bool = knob(False, "torch.compile the model: slow to start, then faster")
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = knob("sdpa", "which attention kernels")

    def __post_init__(self):
        self.lr_decay_iters = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        self.save_interval = self.eval_interval if self.save_interval is None else self.save_interval
        counts = ["batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval"]
        counts += ["save_interval", "keep_checkpoints", "max_nonfinite_steps"]
        below = {"beta1": 1, "beta2": 1, "seed": 2**32}
        for name, value in vars(self).items():
            least, limit = int(name in counts), below.get(name, math.inf)
            if isinstance(value, int | float) and not least <= value < limit:  # which nan is not, either
                raise ValueError(f"{name}={value}, but it must be at least {least}, and below {limit}")


# Flags that shape what is learned, the model's and the data's aside: a resumed run must have the same.
SHAPING = ("learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "seed")
SHAPING += ("decay_lr", "warmup_iters", "lr_decay_iters", "min_lr")

# ---------------------------------------------------------------------------------------------------------------------
# Functions of their arguments alone. A mistake of the user's is a ValueError, in one line.


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """The recipe's flags, then the command line's, which win; exits with one line on a mistake."""
    parser = FlagParser(
        [ModelArguments, DataArguments, RunArguments],
        usage="train_accelerate.py [RECIPE.yaml] [--key=value ...]",
        description=__doc__.split("\n")[0],
    )
    named = bool(argv) and not argv[0].startswith("-")
    recipe = Path(argv[0]) if named else RECIPES / "quickstart.yaml"
    try:
        model_args, data_args, run_args = parser.parse(parser.read_recipe(recipe, RECIPES) + argv[named:])
    except ValueError as mistake:
        parser.error(str(mistake))
    data_args.data_dir = data_args.data_dir or f"data/{recipe.stem}"
    run_args.out_dir = run_args.out_dir or f"out/{recipe.stem}"
    return model_args, data_args, run_args


# ---------------------------------------------------------------------------------------------------------------------
# Batches and evaluation.


def to_device(windows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) as inputs (B, T) and targets (B, T); on CUDA the copy overlaps what the GPU is doing."""
    ids = torch.from_numpy(windows)
    ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)
    return ids[:, :-1], ids[:, 1:].contiguous()


def training_batches(
    stream: TokenStream, args: RunArguments, block_size: int, accelerator: Accelerator, step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches for ever, from optimizer step `step` on; the processes share out the windows of each step."""
    count = args.gradient_accumulation_steps * args.batch_size
    while True:
        offsets = training_offsets(args.seed, step, count, len(stream), block_size)
        for mine in offsets.reshape(-1, accelerator.num_processes, args.batch_size)[:, accelerator.process_index]:
            yield to_device(stream.windows(mine, block_size + 1), accelerator.device)
        step += 1


def seed_dropout(seed: int, step: int, process: int) -> None:
    """Dropout is a function of seed, step and process, so that a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0]))


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    stream: TokenStream,
    tokens: int,
    batch_size: int,
    block_size: int,
    accelerator: Accelerator,
) -> float:
    """Mean loss in nats a token over fixed windows: the same for any batch size and any number of processes."""
    offsets = evaluation_offsets(len(stream), block_size, tokens)
    targets_in_all = np.minimum(block_size, len(stream) - 1 - offsets).sum()
    # Every process runs as many full batches: windows that start at the end of the stream have no target.
    filling = -len(offsets) % (batch_size * accelerator.num_processes)
    offsets = np.append(offsets, np.full(filling, len(stream)))
    model.eval()
    sums = []
    for mine in offsets.reshape(-1, accelerator.num_processes, batch_size)[:, accelerator.process_index]:
        inputs, targets = to_device(stream.windows(mine, block_size + 1), accelerator.device)
        ids, summed = inputs.clamp(min=0), {"num_items_in_batch": 1}  # else the loss would be the mean
        sums.append(model(input_ids=ids, shift_labels=targets, skip_logits=True, use_cache=False, **summed).loss)
    model.train()
    return accelerator.gather(torch.stack(sums)).cpu().double().sum().item() / targets_in_all


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    model_args, data_args, run_args = parse_arguments(argv)
    recipe = {}
    for args in (model_args, data_args, run_args):
        recipe |= {key: value for key, value in dataclasses.asdict(args).items() if value is not None}
    out_dir = Path(run_args.out_dir)

    # -----------------------------------------------------------------------------------------------------------------
    # Process, precision, data: everything that can be wrong with the flags, the checkpoint to go on from or the text
    # shows here, before anything is trained and before anything is written.
    try:
        trackers = choose_trackers(run_args.report_to)
        accelerator = start_accelerator(run_args.dtype, run_args.attn_implementation)
        source, model, learned = model_args.init_from, None, None
        state, resumed = checkpoints.TrainState(), checkpoints.find_resumed(source, out_dir)
        if resumed:
            state, run = checkpoints.read_checkpoint(resumed)
            config = NanoGPTConfig(**run["config"])
            check_given(config, model_args.shape(), source)
            checkpoints.check_same_run(resumed, state.step, run, recipe, SHAPING)
            begun = {key: value for key, value in run["recipe"].items() if key in vars(model_args)}
            recipe |= begun  # run.yaml repeats the whole run
        else:
            config = choose_config(source, model_args.shape())
            if source != "scratch":
                model = load_model(source, config)
                if not find_ckpt(source):  # nanoGPT's files carry no tokenizer
                    learned = load_tokenizer(source, "init_from")
        if not (run_args.eval_only or run_args.prepare_only):
            checkpoints.check_unfinished(out_dir, resumed)
        checkpoints.check_writable(run_args.out_dir)
        windows, processes = run_args.gradient_accumulation_steps * run_args.batch_size, accelerator.num_processes
        if run_args.auto_batch_size and accelerator.device.type != "cuda":
            raise ValueError("auto_batch_size needs a GPU: elsewhere too large a batch may bring down the system")
        if (windows if run_args.auto_batch_size else run_args.gradient_accumulation_steps) % processes:
            raise ValueError(
                f"gradient_accumulation_steps={run_args.gradient_accumulation_steps} counts the micro-batches of all "
                f"processes: it must be divisible by their number, {processes}"
            )
        with accelerator.main_process_first():
            record = prepare(data_args, minimum_tokens=config.block_size + 1, learned=learned)
        data = {key: record[key] for key in ("sha256", "vocab_size", "tokens")}
        if resumed and run["data"] != data:
            raise ValueError(f"data_dir={data_args.data_dir} holds other data than {resumed} was trained on")
        tokenizer = load_tokenizer(data_args.data_dir, "data_dir")
        if model is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{data_args.data_dir} has {len(tokenizer)} tokens, init_from={source} {config.vocab_size}"
            )
    except ValueError as mistake:
        sys.exit(f"train_accelerate.py: error: {mistake}")
    if run_args.prepare_only:
        return
    disable_progress_bar()  # of saving: the bar here is the loop's
    device = accelerator.device
    tokenizer.model_max_length = config.block_size
    train, val = open_stream(data_args.data_dir, "train"), open_stream(data_args.data_dir, "val")

    # -----------------------------------------------------------------------------------------------------------------
    # Model
    set_seed(run_args.seed)
    if source == "scratch":
        config.vocab_size = -(-len(tokenizer) // 64) * 64  # a multiple of 64 is faster
    model = NanoGPTForCausalLM(config) if model is None else model
    know_tokens(model, len(tokenizer), tokenizer.eos_token_id)
    model.set_attn_implementation(run_args.attn_implementation)
    if run_args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device).train()
    if run_args.auto_batch_size:
        run_args.batch_size = largest_batch_size(model, windows // processes, accelerator)
        run_args.gradient_accumulation_steps = windows // run_args.batch_size

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer, compile, prepare
    betas = (run_args.beta1, run_args.beta2)
    optimizer = adamw(model, run_args.learning_rate, betas, run_args.weight_decay)
    if run_args.compile:
        model.compile(dynamic=False)  # in place: no wrapper, no prefix in the names of the weights
    parameters = model.num_parameters()
    model, optimizer = accelerator.prepare(model, optimizer)
    micro_steps = accelerator.gradient_accumulation_steps = run_args.gradient_accumulation_steps // processes
    if resumed:
        checkpoints.restore(resumed, state, model, optimizer.optimizer, accelerator)

    # -----------------------------------------------------------------------------------------------------------------
    # What this run is
    step_tokens = windows * config.block_size
    step_flops = step_tokens * flops_per_token(config)
    peak = peak_flops(device)
    accelerator.print(
        f"{describe(accelerator)}, {run_args.attn_implementation} attention, compile={run_args.compile}\n"
        f"{parameters:,} parameters, {flops_per_token(config):.3g} FLOPs a token, "
        f"{record['tokens']['train']:,} tokens to train on\n"
        f"a step: {step_tokens:,} tokens in {run_args.gradient_accumulation_steps} micro-batches of "
        f"{run_args.batch_size} windows of {config.block_size} tokens"
    )
    if resumed:
        accelerator.print(f"going on after step {state.step}, from {resumed}")
    run = {"recipe": recipe, "config": config.to_dict(), "data": data}
    superseded = checkpoints.superseded_by(out_dir, resumed)
    trackers = Trackers(trackers if accelerator.is_main_process else [], out_dir.name, str(out_dir / "runs"), recipe)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving: out_dir becomes a whole model repository, checkpoints/ holds what a resume needs. A save that fails is
    # made up for by the next one.
    saves = checkpoints.Saves()

    def write_model(weights: dict[str, torch.Tensor]) -> None:
        with checkpoints.written_aside(out_dir) as folder:
            checkpoints.save_gathered(folder, accelerator.unwrap_model(model), weights)
            tokenizer.save_pretrained(folder)
            (folder / "run.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
            template, seen = (RECIPES / "MODEL_CARD.md").read_text(), state.step * step_tokens
            write_report(folder, template, out_dir.name, config, record, state.history, state.step, seen)

    def save_model() -> None:
        weights = accelerator.get_state_dict(model)  # every process takes part
        if accelerator.is_main_process:
            saves.attempt("the model", write_model, weights)

    def save_checkpoint() -> None:
        tensors = checkpoints.gather_tensors(model, optimizer.optimizer)  # every process, too
        state.scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
        if accelerator.is_main_process:
            last = (run_args.keep_checkpoints, superseded)
            saves.attempt("the checkpoint", checkpoints.save_checkpoint, out_dir, state, tensors, run, *last)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop: one step is one optimizer update
    def say(line: str) -> None:
        if accelerator.is_main_process:
            bar.write(line)
            sys.stdout.flush()  # a killed run has its lines in the log file

    batches = training_batches(train, run_args, config.block_size, accelerator, state.step)
    inputs, targets = next(batches)
    seen = StepRecord(accelerator)  # what the steps came to
    logged_step, logged_at = state.step, time.perf_counter()
    signals, stop, failed = Signals(), 0, ""
    rhythm = 0.5 if sys.stderr.isatty() else 10  # seconds between redraws: few in a log file
    total, first = run_args.max_iters, state.step
    bar = tqdm(total=total, initial=first, unit="step", mininterval=rhythm, disable=run_args.eval_only)
    for step in range(first, total + 1):
        # evaluate on fixed windows, and save
        if step % run_args.eval_interval == 0 or step == total or run_args.eval_only:
            paused_at = time.perf_counter()
            size = (run_args.batch_size, config.block_size, accelerator)
            val_loss = evaluate(model, val, run_args.eval_tokens, *size)
            train_loss = evaluate(model, train, run_args.eval_tokens or len(val), *size)
            state.history.append({"step": step, "eval_train_loss": train_loss, "val_loss": val_loss})
            trackers.log(state.history[-1])
            say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            better = val_loss < state.best_val_loss
            state.best_val_loss = min(state.best_val_loss, val_loss)  # which nan never is
            if step > 0 and (better or run_args.always_save_checkpoint) and not run_args.eval_only:
                save_model()
            logged_at += time.perf_counter() - paused_at  # tokens/s counts training alone
        if step == total or run_args.eval_only:
            break

        # set the learning rate
        lr = run_args.learning_rate
        if run_args.decay_lr:
            lr = learning_rate_at(step, lr, run_args.min_lr, run_args.warmup_iters, run_args.lr_decay_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward, backward, update; every micro-batch has as many targets, so the mean of their means is the mean
        seed_dropout(run_args.seed, step, accelerator.process_index)
        for _ in range(micro_steps):
            with accelerator.accumulate(model):
                loss = model(input_ids=inputs, shift_labels=targets, skip_logits=True, use_cache=False).loss
                inputs, targets = next(batches)  # fetched while the device is busy with the forward pass
                accelerator.backward(loss)  # divides by micro_steps, and scales in fp16
                seen.add_loss(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), run_args.grad_clip or math.inf)
                    optimizer.optimizer.found_inf = seen.end_step(norm)  # with 1.0 the update leaves all as it is
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        bar.update()

        # log and save; losses are read off the device here only
        stop, wanted = signals.poll()
        saving = wanted or stop or state.step == total or state.step % run_args.save_interval == 0
        logging = state.step % run_args.log_interval == 0
        if saving or logging:
            for index, micro_batches in seen.look(state):
                offsets = training_offsets(run_args.seed, index, windows, len(train), config.block_size)
                say(name_skipped(index, micro_batches, offsets.reshape(-1, processes, run_args.batch_size)))
            if state.nonfinite >= run_args.max_nonfinite_steps:
                last = checkpoints.newest_complete(out_dir) or "none yet"
                failed = f"stopped after {state.nonfinite} such steps in a row; the last good checkpoint: {last}"
                break
        if logging:
            rate = (state.step - logged_step) / (time.perf_counter() - logged_at)  # steps a second
            entry = seen.summary(state) | {"lr": lr, "tokens_per_second": rate * step_tokens}
            if peak:
                entry["mfu"] = rate * step_flops / (peak * processes)
            state.history.append(entry)
            trackers.log(entry)
            mfu = f", mfu {entry['mfu']:.1%}" if peak else ""
            rate_shown = f"{entry['tokens_per_second']:,.0f} tok/s{mfu}"
            bar.set_postfix_str(f"loss {entry['loss'] or math.nan:.4f}, lr {lr:.2e}, {rate_shown}", refresh=False)
            logged_step, logged_at = state.step, time.perf_counter()
        if saving:
            paused_at = time.perf_counter()
            save_checkpoint()
            logged_at += time.perf_counter() - paused_at
        if stop:
            break

    bar.close()
    signals.restore()
    trackers.finish()
    failed = failed or saves.failed
    if stop and not failed:
        accelerator.print(f"stopped by a signal after step {state.step}; --init_from=resume goes on from there")
    elif not failed and not run_args.eval_only:
        accelerator.print(f"best val loss {state.best_val_loss:.4f}; the model is in {out_dir}")
    # Wait for the last save. Besides, a process that left at once could hang in gloo's destructor, which holds the GIL
    # while a thread of its own still needs it to free the last gathered tensor.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if stop or failed:
        sys.exit(f"train_accelerate.py: error: {failed}" if failed else 128 + stop)


def run(argv: list[str]) -> None:
    """main, but a model that does not fit into memory ends in one line that says which flags help."""
    try:
        main(argv)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        args = parse_arguments(argv)[2]
        sys.exit(f"\ntrain_accelerate.py: error: {explain_out_of_memory(**vars(args))}")


if __name__ == "__main__":
    run(sys.argv[1:])
