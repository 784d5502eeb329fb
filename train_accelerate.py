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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils.logging import disable_progress_bar

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt import checkpointing as checkpoints
from modeling_nanogpt.fitting import check_shares, explain_out_of_memory, largest_batch_size
from modeling_nanogpt.launching import describe, main_first, start_accelerator
from modeling_nanogpt.optimization import learning_rate_at, make_optimizer
from modeling_nanogpt.progress import Progress
from modeling_nanogpt.publishing import Report, draw_samples, find_commit
from modeling_nanogpt.pushing import start_pusher
from modeling_nanogpt.recording import StepRecord, name_skipped
from modeling_nanogpt.signals import Signals
from modeling_nanogpt.sources import find_ckpt, know_tokens
from modeling_nanogpt.starting import find_start
from modeling_nanogpt.throughput import flops_per_token, peak_flops
from modeling_nanogpt.tracking import Trackers, choose_trackers
from tokenization.arguments import DataArguments, FlagParser, knob
from tokenization.prepare import prepare
from tokenization.vocabularies import load_tokenizer
from tokenization.windows import TokenStream, Windows, evaluation_windows, training_windows

RECIPES = Path(__file__).parent / "hub_configs"
LOSS_ONLY = {"skip_logits": True, "use_cache": False}  # what the model need not return in training

# ---------------------------------------------------------------------------------------------------------------------
# Knobs. What text to train on is in tokenization/arguments.py.


@dataclasses.dataclass
class ModelArguments:
    init_from: str = knob("scratch", "scratch, resume, or a model: a folder, Hub id or nanoGPT's ckpt.pt")
    revision: str | None = knob(None, "branch, tag or commit of an init_from that is a Hub id (default: main)")
    block_size: int | None = knob(None, "longest context, tokens (scratch: 1024)")
    n_layer: int | None = knob(None, "blocks (scratch: 12)")
    n_head: int | None = knob(None, "attention heads, a divisor of n_embd (scratch: 12)")
    n_embd: int | None = knob(None, "width (scratch: 768)")
    dropout: float | None = knob(None, "probability; 0.1 and more help where the text is small (scratch: 0)")
    bias: bool | None = knob(None, "biases in linear layers and layer norms, as GPT-2 has them (scratch: false)")
    activation_function: str | None = knob(None, "gelu, or gelu_new, GPT-2's approximation of it (scratch: gelu)")

    def shape(self) -> dict:
        """What is given of NanoGPTConfig's keys."""
        shape = vars(self).keys() - {"init_from", "revision"}
        return {key: value for key, value in vars(self).items() if key in shape and value is not None}


@dataclasses.dataclass
class RunArguments:
    out_dir: str | None = knob(None, "where the model is saved (default: out/RECIPE)")
    # batch: one optimizer step sees gradient_accumulation_steps * batch_size * block_size tokens
    batch_size: int = knob(12, "windows in a micro-batch")
    gradient_accumulation_steps: int = knob(40, "micro-batches in an optimizer step, over all processes together")
    # optimizer
    optimizer: Literal["adamw", "muon"] = knob("adamw", "of the blocks' matrices; all else is AdamW's")
    learning_rate: float = knob(6e-4, "the highest; muon gives all but matrices 100 / n_embd of it")
    max_iters: int = knob(600_000, "optimizer steps in all")
    weight_decay: float = knob(0.1, "of matrices and embeddings")
    beta1: float = knob(0.9, "of adamw: decay of the mean of gradients")
    beta2: float = knob(0.95, "of adamw: decay of the mean of their squares")
    momentum: float = knob(0.95, "of muon: decay of the mean of gradients")
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 clips nothing")
    # learning rate
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob("cosine", "after warmup; wsd: late and linear")
    decay_fraction: float = knob(0.4, "of wsd: the last part of lr_decay_iters, in which it decays")
    decay_lr: bool = knob(True, "false: a constant learning rate, without warmup")
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
    # the Hub
    push_to_hub: bool = knob(False, "push out_dir, with the token of `hf auth login` or HF_TOKEN")
    hub_model_id: str | None = knob(None, "user/name to push to, or resume from (default: your user, out_dir's name)")
    hub_private_repo: bool = knob(True, "nobody else sees it")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = knob("every_save", "checkpoint: to resume from, too")
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
        if not self.decay_lr:
            self.lr_schedule, self.warmup_iters = "constant", 0
        self.save_interval = self.eval_interval if self.save_interval is None else self.save_interval
        counts = ["batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval"]
        counts += ["save_interval", "keep_checkpoints", "max_nonfinite_steps"]
        below = {"beta1": 1, "beta2": 1, "momentum": 1, "decay_fraction": 1, "seed": 2**32}
        for name, value in vars(self).items():
            least, limit = int(name in counts), below.get(name, math.inf)
            if isinstance(value, int | float) and not least <= value < limit:  # which nan is not, either
                raise ValueError(f"{name}={value}, but it must be at least {least}, and below {limit}")


SCHEDULE = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "lr_schedule", "decay_fraction")
# Flags that shape what is learned, the model's and the data's aside: a resumed run must have the same.
SHAPING = (*SCHEDULE, "optimizer", "weight_decay", "beta1", "beta2", "momentum", "grad_clip", "seed", "windows")

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
    return ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()  # where there is no target, any input will do


def training_batches(
    stream: TokenStream, draw: Callable, step: int, batch_size: int, block_size: int, accelerator: Accelerator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Micro-batches for ever, from optimizer step `step` on; the processes share out the windows of draw(step).

    With inputs and targets comes what the sum of their losses is divided by, so that every target of a step counts the
    same: the mean number of targets in its micro-batches, over all processes.
    """
    while True:
        windows: Windows = draw(step)
        items = windows.lengths.sum().item() / (len(windows) // batch_size)
        for mine in windows.shares(batch_size, accelerator.num_processes, accelerator.process_index):
            ids = stream.windows(mine.offsets, mine.lengths, block_size)
            yield *to_device(ids, accelerator.device), items
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
    windows = evaluation_windows(len(stream), block_size=block_size, tokens=tokens)
    # Pad with empty windows, so that every process runs the same number of full batches.
    padded = windows.padded(batch_size * accelerator.num_processes)
    model.eval()
    sums = []
    for mine in padded.shares(batch_size, accelerator.num_processes, accelerator.process_index):
        ids = stream.windows(mine.offsets, mine.lengths, block_size)
        inputs, targets = to_device(ids, accelerator.device)
        loss = model(inputs, shift_labels=targets, num_items_in_batch=1, **LOSS_ONLY).loss  # so the mean is the sum
        sums.append(loss)
    model.train()
    return accelerator.gather(torch.stack(sums)).cpu().double().sum().item() / windows.lengths.sum()


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
        start = find_start(model_args.init_from, model_args.shape(), out_dir, recipe, SHAPING)
        config, model, state, learned = start.config, start.model, start.state, None
        began = start.run.get("recipe", {})  # of a resumed run: run.yaml repeats it from its beginning
        recipe |= {key: value for key, value in began.items() if key in vars(model_args)}
        if model is not None and not find_ckpt(model_args.init_from):  # nanoGPT's files carry no tokenizer
            learned = load_tokenizer(model_args.init_from, "init_from", model_args.revision)
        checkpoints.check_writable(run_args.out_dir)
        windows, processes = run_args.gradient_accumulation_steps * run_args.batch_size, accelerator.num_processes
        check_shares(run_args.gradient_accumulation_steps, windows, run_args.auto_batch_size, accelerator)
        if run_args.optimizer == "muon" and accelerator.distributed_type == "FSDP":
            raise ValueError("optimizer=muon needs whole matrices, which FSDP cuts up: take --optimizer=adamw")
        minimum_tokens = config.block_size + 1
        prepared = main_first(lambda: prepare(data_args, minimum_tokens=minimum_tokens, model_tokenizer=learned))
        record, tokenizer = prepared.record, prepared.tokenizer
        data = {key: record[key] for key in ("sha256", "vocab_size", "tokens")}
        if start.resumed and start.run["data"] != data:
            raise ValueError(f"data_dir={data_args.data_dir} holds other data than {start.resumed} was trained on")
        if model is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{data_args.data_dir} has {len(tokenizer)} tokens, but init_from={model_args.init_from} "
                f"{config.vocab_size}"
            )
        pushes = run_args.push_to_hub and not (run_args.eval_only or run_args.prepare_only)
        hub = (run_args.hub_model_id, run_args.hub_private_repo, run_args.hub_strategy)
        pusher = start_pusher(accelerator.is_main_process, out_dir, *hub) if pushes else None
    except ValueError as mistake:
        sys.exit(f"train_accelerate.py: error: {mistake}")
    if run_args.prepare_only:
        return
    disable_progress_bar()  # of saving: the bar here is the loop's
    device = accelerator.device
    tokenizer.model_max_length = config.block_size
    train, val = prepared.stream("train"), prepared.stream("val")

    # -----------------------------------------------------------------------------------------------------------------
    # Model
    set_seed(run_args.seed)
    if model_args.init_from == "scratch":
        config.vocab_size = -(-len(tokenizer) // 64) * 64  # a multiple of 64 is faster
    model = NanoGPTForCausalLM(config) if model is None else model
    know_tokens(model, len(tokenizer), tokenizer.eos_token_id)
    model.set_attn_implementation(run_args.attn_implementation)
    if run_args.gradient_checkpointing:
        # transformers has renamed the method; the floor knows the former name alone
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.to(device).train()
    if run_args.auto_batch_size:
        run_args.batch_size = largest_batch_size(model, windows // processes, accelerator)
        run_args.gradient_accumulation_steps = windows // run_args.batch_size

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer, compile, prepare
    settings = (run_args.learning_rate, (run_args.beta1, run_args.beta2), run_args.weight_decay)
    optimizer = make_optimizer(run_args.optimizer, model, *settings, momentum=run_args.momentum)
    if run_args.compile:
        model.compile(dynamic=False)  # in place: no wrapper, no prefix in the names of the weights
    parameters = model.num_parameters()
    model, optimizer = accelerator.prepare(model, optimizer)
    micro_steps = accelerator.gradient_accumulation_steps = run_args.gradient_accumulation_steps // processes
    if start.resumed:
        checkpoints.restore(start.resumed, state, model, optimizer.optimizer, accelerator)

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
    if start.resumed:
        accelerator.print(f"going on after step {state.step}, from {start.resumed}")
    run = {"recipe": recipe, "config": config.to_dict(), "data": data}
    what = (config, parameters, record, recipe, step_tokens, describe(accelerator), find_commit())
    report = Report((RECIPES / "MODEL_CARD.md").read_text(), pusher.model_id if pusher else out_dir.name, *what)
    trackers = Trackers(trackers if accelerator.is_main_process else [], out_dir.name, str(out_dir / "runs"), recipe)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving: out_dir becomes a whole model repository, checkpoints/ holds what a resume needs. A save that fails is
    # made up for by the next one.
    saves = checkpoints.Saves()

    def write_model(weights: dict[str, torch.Tensor], samples: list[str]) -> None:
        with checkpoints.written_aside(out_dir) as folder:
            checkpoints.save_gathered(folder, accelerator.unwrap_model(model), weights)
            tokenizer.save_pretrained(folder)
            report.write(folder, state.history, state.step, samples, earlier=out_dir / "README.md")
        if pusher:
            pusher.saved(f"step {state.step}: val loss {val_loss:.4f}")

    def save_model() -> None:
        weights = accelerator.get_state_dict(model)  # every process takes part, here and in drawing
        samples = draw_samples(model, tokenizer, config.block_size, device)
        if accelerator.is_main_process:
            saves.attempt("the model", write_model, weights, samples)

    def save_checkpoint() -> None:
        tensors = checkpoints.gather_tensors(model, optimizer.optimizer)  # every process, too
        state.scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
        if accelerator.is_main_process:
            old = (run_args.keep_checkpoints, start.superseded)
            saves.attempt("the checkpoint", checkpoints.save_checkpoint, out_dir, state, tensors, run, *old)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop: one step is one optimizer update
    sampling = {"order": data_args.windows, "seed": run_args.seed, "count": windows, "block_size": config.block_size}

    def draw(step: int) -> Windows:
        return training_windows(train, step=step, **sampling)

    batches = training_batches(train, draw, state.step, run_args.batch_size, config.block_size, accelerator)
    inputs, targets, items = next(batches)
    seen = StepRecord(accelerator)  # what the steps came to
    logged_step, logged_at = state.step, time.perf_counter()
    signals, stop, failed = Signals(), 0, ""
    total = run_args.max_iters
    bar = Progress(accelerator, state.step, total, visible=not run_args.eval_only)
    for step in range(state.step, total + 1):
        # evaluate on fixed windows, and save
        if step % run_args.eval_interval == 0 or step == total or run_args.eval_only:
            paused_at = time.perf_counter()
            size = (run_args.batch_size, config.block_size, accelerator)
            val_loss = evaluate(model, val, run_args.eval_tokens, *size)
            train_loss = evaluate(model, train, run_args.eval_tokens or len(val), *size)
            state.history.append({"step": step, "eval_train_loss": train_loss, "val_loss": val_loss})
            trackers.log(state.history[-1])
            bar.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            better = val_loss < state.best_val_loss
            state.best_val_loss = min(state.best_val_loss, val_loss)  # which nan never is
            if step > 0 and (better or run_args.always_save_checkpoint) and not run_args.eval_only:
                save_model()
            logged_at += time.perf_counter() - paused_at  # tokens/s counts training alone
        if step == total or run_args.eval_only:
            break

        # set the learning rate
        lr = learning_rate_at(step, *(getattr(run_args, name) for name in SCHEDULE))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward, backward, update
        seed_dropout(run_args.seed, step, accelerator.process_index)
        for _ in range(micro_steps):
            with accelerator.accumulate(model):
                loss = model(inputs, shift_labels=targets, num_items_in_batch=items, **LOSS_ONLY).loss
                inputs, targets, items = next(batches)  # fetched while the device is busy with the forward pass
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
                offsets = draw(index).offsets.reshape(-1, processes, run_args.batch_size)
                bar.say(name_skipped(index, micro_batches, offsets))
            if seen.most_in_a_row >= run_args.max_nonfinite_steps:
                last = checkpoints.newest_complete(out_dir) or "none yet"
                failed = f"stopped after {seen.most_in_a_row} such steps in a row; the last good checkpoint: {last}"
                break
        if logging:
            rate = (state.step - logged_step) / (time.perf_counter() - logged_at)  # steps a second
            entry = seen.summary(state) | {"lr": lr, "tokens_per_second": rate * step_tokens}
            if peak:
                entry["mfu"] = rate * step_flops / (peak * processes)
            state.history.append(entry)
            trackers.log(entry)
            bar.show(entry)
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
    if pusher:  # last, as it may take longer than processes wait for each other
        pusher.finish(f"step {state.step}: stopped" if stop else None)
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
        size = (args.batch_size, args.gradient_accumulation_steps, args.gradient_checkpointing)
        sys.exit(f"\ntrain_accelerate.py: error: {explain_out_of_memory(*size)}")  # below the bar


if __name__ == "__main__":
    run(sys.argv[1:])
