"""Train a GPT on a text, from top to bottom: knobs, batches, model, optimizer, loop.

    python train_accelerate.py                                                             the quickstart recipe
    accelerate launch train_accelerate.py hub_configs/shakespeare_char.yaml                another recipe
    accelerate launch --num_processes 8 train_accelerate.py RECIPE.yaml --batch_size=8     eight GPUs, and a flag

A recipe is a YAML file of flags, one `key: value` a line; the command line wins over it. After each save, out_dir
holds the model with all that loading it and repeating the run need.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import parse_flag_from_env, set_seed, tqdm
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import disable_progress_bar

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.checkpointing import check_writable, written_aside
from modeling_nanogpt.conversion import crop_positions
from modeling_nanogpt.muon import muon
from modeling_nanogpt.optimization import adamw, learning_rate_at
from modeling_nanogpt.publishing import write_report
from modeling_nanogpt.sources import build_model, find_ckpt, read_config, read_weights
from modeling_nanogpt.throughput import flops_per_token, peak_flops
from tokenization.arguments import DataArguments, FlagParser, knob
from tokenization.prepare import load_tokenizer, prepare
from tokenization.windows import TokenStream, evaluation_offsets, open_stream, training_offsets

RECIPES = Path(__file__).parent / "hub_configs"

# ---------------------------------------------------------------------------------------------------------------------
# Knobs. What text to train on is in tokenization/arguments.py.


@dataclasses.dataclass
class ModelArguments:
    init_from: str = knob("scratch", "scratch, or what to go on from: a folder, Hub id or nanoGPT's ckpt.pt")
    block_size: int | None = knob(None, "longest context, tokens (scratch: 1024)")
    n_layer: int | None = knob(None, "blocks (scratch: 12)")
    n_head: int | None = knob(None, "attention heads, a divisor of n_embd (scratch: 12)")
    n_embd: int | None = knob(None, "width (scratch: 768)")
    dropout: float | None = knob(None, "probability; 0.1 and more help where the text is small (scratch: 0)")
    bias: bool | None = knob(None, "biases in linear layers and layer norms, as GPT-2 has them (scratch: false)")
    activation_function: str | None = knob(None, "gelu, or gelu_new, GPT-2's approximation of it (scratch: gelu)")


@dataclasses.dataclass
class RunArguments:
    out_dir: str | None = knob(None, "where the model is saved (default: out/RECIPE)")
    # batch: one optimizer step sees gradient_accumulation_steps * batch_size * block_size tokens
    batch_size: int = knob(12, "windows in a micro-batch")
    gradient_accumulation_steps: int = knob(40, "micro-batches in an optimizer step, over all processes together")
    # optimizer
    optimizer: Literal["adamw", "muon"] = knob("adamw", "of the blocks' matrices; all else is AdamW's")
    learning_rate: float = knob(6e-4, "the highest learning rate")
    max_iters: int = knob(600_000, "optimizer steps in all")
    weight_decay: float = knob(0.1, "of matrices and embeddings")
    beta1: float = knob(0.9, "decay of the mean of gradients")
    beta2: float = knob(0.95, "decay of the mean of their squares")
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 clips nothing")
    # learning rate
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob("cosine", "after warmup; wsd: late and linear")
    decay_lr: bool = knob(True, "false: a constant learning rate, from the first step on")
    warmup_iters: int = knob(2000, "optimizer steps of linear warmup")
    decay_fraction: float = knob(0.4, "of wsd: the last part of lr_decay_iters, in which it decays")
    lr_decay_iters: int | None = knob(None, "optimizer step at which the decay ends (default: max_iters)")
    min_lr: float | None = knob(None, "where the decay ends (default: learning_rate / 10)")
    # evaluation, logging, saving
    eval_interval: int = knob(2000, "optimizer steps between evaluations")
    eval_tokens: int = knob(0, "tokens evaluated of each split; 0: all of val, and as many of train")
    log_interval: int = knob(10, "optimizer steps between entries in the log")
    always_save_checkpoint: bool = knob(True, "save after each evaluation; otherwise only where val loss is the best")
    eval_only: bool = knob(False, "evaluate and stop; nothing is saved")
    prepare_only: bool = knob(False, "stop once data_dir is there")
    # system
    seed: int = knob(1337, "of the weights, the windows and dropout")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "of the arithmetic; weights are float32")
    compile: bool = knob(False, "torch.compile the model: slow to start, then faster")
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = knob("sdpa", "which attention kernels")

    def __post_init__(self):
        self.lr_decay_iters = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        if not self.decay_lr:
            self.lr_schedule, self.warmup_iters = "constant", 0
        counts = ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval")
        below = {"beta1": 1, "beta2": 1, "decay_fraction": 1, "seed": 2**32}
        for name, value in vars(self).items():
            least, limit = int(name in counts), below.get(name, math.inf)
            if isinstance(value, int | float) and not least <= value < limit:  # which nan is not, either
                raise ValueError(f"{name}={value}, but it must be at least {least}, and below {limit}")


# ---------------------------------------------------------------------------------------------------------------------
# Functions of their arguments alone. A mistake of the user's is a ValueError, in one line.


def read_recipe(path: Path, parser: FlagParser) -> list[str]:
    """A YAML file as flags: each `key: value` becomes --key=value; a null keeps the default."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError:
        known = ", ".join(sorted(str(recipe.stem) for recipe in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {path} cannot be read; hub_configs/ holds {known}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"recipe {path} is not a list of `key: value` lines")
    flags = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"recipe {path}: line {key.start_mark.line + 1} is no `key: value`")
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"recipe {path}: {key.value} must be a single value")
        if key.value not in parser.keys:
            raise ValueError(f"recipe {path}: {parser.explain_unknown(key.value)}")
        if key.value in flags:
            raise ValueError(f"recipe {path}: {key.value} stands there twice")
        flags[key.value] = value
    null = "tag:yaml.org,2002:null"  # null, ~ or nothing, unless in quotes
    return [f"--{key}={value.value}" for key, value in flags.items() if value.tag != null]


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
        model_args, data_args, run_args = parser.parse(read_recipe(recipe, parser) + argv[named:])
    except ValueError as mistake:
        parser.error(str(mistake))
    data_args.data_dir = data_args.data_dir or f"data/{recipe.stem}"
    run_args.out_dir = run_args.out_dir or f"out/{recipe.stem}"
    return model_args, data_args, run_args


def build_config(args: ModelArguments) -> NanoGPTConfig:
    """The model's shape: the flags', or the checkpoint's, which may get another dropout or a smaller block_size."""
    given = {key: value for key, value in dataclasses.asdict(args).items() if key != "init_from" and value is not None}
    try:
        if args.init_from == "scratch":
            return NanoGPTConfig(**given)
        config = read_source(args.init_from, read_config)
        changes = {"dropout": given.get("dropout", config.dropout)}
        if given.get("block_size", config.block_size) < config.block_size:
            changes["block_size"] = given["block_size"]
        config = NanoGPTConfig(**config.to_dict() | changes)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__)) from None
    for key, value in given.items():
        theirs = getattr(config, key)
        if value != theirs:
            raise ValueError(f"{key}={value}, but init_from={args.init_from} has {key}={theirs}: leave it out")
    return config


def read_source(init_from: str, read: Callable):
    """What one of the functions of sources.py reads; a mistake names the flag."""
    try:
        return read(init_from)
    except ValueError as mistake:
        raise ValueError(f"init_from={mistake}") from None


def choose_precision(dtype: str, attention: str, device: torch.device) -> str:
    """Accelerate's name of the precision; `auto` is what `accelerate launch` asks for, else the device's best."""
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in names.values():
        raise ValueError(f"accelerate launch asks for mixed_precision={launched}; no, bf16 and fp16 are known")
    if dtype != "auto":
        if launched not in ("no", names[dtype]):
            raise ValueError(
                f"dtype={dtype}, but accelerate launch asks for mixed_precision={launched}: drop one of them"
            )
        precision = names[dtype]
    elif launched == "no" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    else:
        precision = launched
    if attention == "flex_attention" and device.type == "cpu":
        raise ValueError("attn_implementation=flex_attention trains on a GPU only: on a CPU use sdpa or eager")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("dtype=float16 needs a GPU: on a CPU use --dtype=float32 or --dtype=bfloat16")
    return precision


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
        # num_items_in_batch=1 turns the mean into the sum
        loss = model(
            input_ids=inputs.clamp(min=0),
            shift_labels=targets,
            skip_logits=True,
            use_cache=False,
            num_items_in_batch=1,
        ).loss
        sums.append(loss)
    model.train()
    return accelerator.gather(torch.stack(sums)).cpu().double().sum().item() / targets_in_all


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    model_args, data_args, run_args = parse_arguments(argv)

    # -----------------------------------------------------------------------------------------------------------------
    # Process, precision, data: everything that can be wrong with the flags, the checkpoint to go on from or the text
    # shows here, before anything is trained and before anything is written.
    try:
        config = build_config(model_args)
        source, model, learned = model_args.init_from, None, None
        if source != "scratch":
            weights = crop_positions(read_source(source, read_weights), config.block_size)
            model = build_model(NanoGPTForCausalLM, config, weights, torch.float32)
            if not find_ckpt(source):  # nanoGPT's files carry no tokenizer
                learned = load_tokenizer(source, "init_from")
        check_writable(run_args.out_dir)
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        accelerator = Accelerator(
            mixed_precision=choose_precision(run_args.dtype, run_args.attn_implementation, state.device),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != accelerator.num_processes:  # as torchrun alone does on CPUs
            raise ValueError(f"{started} processes were started, but each is alone: set ACCELERATE_USE_CPU=true")
        micro_steps, rest = divmod(run_args.gradient_accumulation_steps, accelerator.num_processes)
        if rest:
            raise ValueError(
                f"gradient_accumulation_steps={run_args.gradient_accumulation_steps} counts the micro-batches of all "
                f"processes: it must be divisible by their number, {accelerator.num_processes}"
            )
        with accelerator.main_process_first():
            record = prepare(data_args, minimum_tokens=config.block_size + 1, learned=learned)
        tokenizer = load_tokenizer(data_args.data_dir, "data_dir")
        if model is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{data_args.data_dir} has {len(tokenizer)} tokens, init_from={source} {config.vocab_size}"
            )
    except ValueError as mistake:
        sys.exit(f"train_accelerate.py: error: {mistake}")
    if run_args.prepare_only:
        return
    accelerator.gradient_accumulation_steps = micro_steps
    device = accelerator.device
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        # `accelerate launch` has set OMP_NUM_THREADS=1, which halves the speed on two cores
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // accelerator.num_processes))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where the arithmetic is float32
    disable_progress_bar()  # of saving: the bar here is the loop's

    out_dir = Path(run_args.out_dir)
    tokenizer.model_max_length = config.block_size
    train, val = open_stream(data_args.data_dir, "train"), open_stream(data_args.data_dir, "val")

    # -----------------------------------------------------------------------------------------------------------------
    # Model
    set_seed(run_args.seed)
    if model is None:
        config.vocab_size = -(-len(tokenizer) // 64) * 64  # a multiple of 64 is faster
        model = NanoGPTForCausalLM(config)
    for holder in (model.config, model.generation_config):
        holder.bos_token_id = holder.eos_token_id = holder.pad_token_id = tokenizer.eos_token_id
    unused = list(range(len(tokenizer), config.vocab_size))  # ids that no text becomes are never generated
    model.generation_config.suppress_tokens = unused or None
    model.set_attn_implementation(run_args.attn_implementation)
    model.to(device)
    set_seed(run_args.seed, device_specific=True)  # dropout differs between processes, weights do not

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer, compile, prepare
    betas = (run_args.beta1, run_args.beta2)
    make_optimizer = {"adamw": adamw, "muon": muon}[run_args.optimizer]
    optimizer = make_optimizer(model, run_args.learning_rate, betas, run_args.weight_decay)
    schedule = [
        getattr(run_args, name)
        for name in ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "lr_schedule", "decay_fraction")
    ]
    if run_args.compile:
        model.compile(dynamic=False)  # in place: no wrapper, no prefix in the names of the weights
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    # -----------------------------------------------------------------------------------------------------------------
    # What this run is
    step_tokens = run_args.gradient_accumulation_steps * run_args.batch_size * config.block_size
    step_flops = step_tokens * flops_per_token(config)
    peak = peak_flops(device)
    parameters = accelerator.unwrap_model(model).num_parameters()
    accelerator.print(
        f"{parameters:,} parameters, {step_tokens:,} tokens a step, {record['tokens']['train']:,} tokens to train on\n"
        f"{accelerator.num_processes} process(es) on {device.type}, {accelerator.mixed_precision} mixed precision, "
        f"{run_args.attn_implementation} attention, compile {run_args.compile}"
    )
    recipe = {}
    for args in (model_args, data_args, run_args):
        recipe |= {key: value for key, value in dataclasses.asdict(args).items() if value is not None}

    # -----------------------------------------------------------------------------------------------------------------
    # Saving: out_dir becomes a whole model repository each time
    def save(step: int, history: list[dict]) -> None:
        state_dict = accelerator.get_state_dict(model)  # every process takes part
        if not accelerator.is_main_process:
            return
        with written_aside(out_dir) as folder:
            accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state_dict)
            tokenizer.save_pretrained(folder)
            (folder / "run.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
            template = (RECIPES / "MODEL_CARD.md").read_text()
            write_report(folder, template, out_dir.name, config, record, history, step, step * step_tokens)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop: one step is one optimizer update
    batches = training_batches(train, run_args, config.block_size, accelerator, step=0)
    inputs, targets = next(batches)
    best_val_loss = math.inf
    history = []
    loss_sum, logged_step, logged_at = torch.zeros((), device=device), 0, time.perf_counter()
    rhythm = 0.5 if sys.stderr.isatty() else 10  # seconds between redraws: few in a log file
    bar = tqdm(total=run_args.max_iters, unit="step", mininterval=rhythm, disable=run_args.eval_only)
    for step in range(run_args.max_iters + 1):
        # evaluate on fixed windows, and save
        if step % run_args.eval_interval == 0 or step == run_args.max_iters:
            paused_at = time.perf_counter()
            size = (run_args.batch_size, config.block_size, accelerator)
            val_loss = evaluate(model, val, run_args.eval_tokens, *size)
            train_loss = evaluate(model, train, run_args.eval_tokens or len(val), *size)
            history.append({"step": step, "eval_train_loss": train_loss, "val_loss": val_loss})
            if accelerator.is_main_process:
                bar.write(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
                sys.stdout.flush()  # a killed run has its lines in the log file
            if step > 0 and (val_loss < best_val_loss or run_args.always_save_checkpoint):
                save(step, history)
            best_val_loss = min(best_val_loss, val_loss)
            logged_at += time.perf_counter() - paused_at  # tokens/s counts training alone
        if step == run_args.max_iters or run_args.eval_only:
            break

        # set the learning rate
        lr = learning_rate_at(step, *schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward, backward, update; every micro-batch has as many targets, so the mean of their means is the mean
        for _ in range(micro_steps):
            with accelerator.accumulate(model):
                loss = model(input_ids=inputs, shift_labels=targets, skip_logits=True, use_cache=False).loss
                inputs, targets = next(batches)  # fetched while the device is busy with the forward pass
                accelerator.backward(loss)  # divides by micro_steps, and scales in fp16
                loss_sum += loss.detach()
                if accelerator.sync_gradients:
                    if run_args.grad_clip > 0:
                        accelerator.clip_grad_norm_(model.parameters(), run_args.grad_clip)  # unscales first
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

        # log; the loss is read off the device here only
        bar.update()
        if (step + 1) % run_args.log_interval == 0:
            steps = step + 1 - logged_step
            loss = accelerator.reduce(loss_sum, "mean").item() / (steps * micro_steps)
            rate = steps / (time.perf_counter() - logged_at)  # steps a second
            entry = {"step": step + 1, "loss": loss, "lr": lr, "tokens_per_second": rate * step_tokens}
            if peak:
                entry["mfu"] = rate * step_flops / (peak * accelerator.num_processes)
            history.append(entry)
            mfu = f", mfu {entry['mfu']:.1%}" if peak else ""
            rate_shown = f"{entry['tokens_per_second']:,.0f} tok/s{mfu}"
            bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate_shown}", refresh=False)
            loss_sum.zero_()
            logged_step, logged_at = step + 1, time.perf_counter()
    bar.close()
    if not run_args.eval_only:
        accelerator.print(f"best val loss {best_val_loss:.4f}; the model is in {out_dir}")
    # Wait for the last save. Besides, a process that left at once could hang in gloo's destructor, which holds the GIL
    # while a thread of its own still needs it to free the last gathered tensor.
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
