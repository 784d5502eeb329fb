"""Time training steps and samples beside nanoGPT's own programs and beside bare PyTorch loops, in one run.

    python -m modeling_nanogpt.bench train hub_configs/shakespeare_char_cpu.yaml --nanogpt CHECKOUT
    python -m modeling_nanogpt.bench sample out/quickstart --nanogpt CHECKOUT --also="--stride 1"

Peers take turns, each in a process of its own. Ours and nanoGPT's run as a user runs them. `train` first trains all
peers from the same weights on the same window, and compares their losses. One loop is over our model, and shows what
Accelerate and our trainer cost; the other is over transformers' GPT2LMHeadModel with the same weights.
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import json
import os
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_start import begin_command

from .command_line import CommandParser

parser = CommandParser("modeling_nanogpt.bench", usage="train RECIPE | sample MODEL [--flag ...]", description=__doc__)
parser.add_argument("what", choices=("train", "sample"), metavar="train|sample", help="what is timed")
parser.add_path("subject", metavar="RECIPE|MODEL", help="recipe to train with, or folder of a model to sample from")
parser.add_path("--nanogpt", metavar="PATH", help="checkout of nanoGPT, to time its programs as well")
parser.add_argument("--flags", metavar="FLAGS", default="", help="train: flags of the trainer that all peers get")
parser.add_argument("--also", metavar="FLAGS", action="append", default=[], help="time ours again, with these flags")
parser.add_number("--steps", 100, "train: optimizer steps of a run", at_least=40)
parser.add_number("--max_new_tokens", 500, "sample: tokens in each of ten samples", at_least=1)
parser.add_number("--rounds", 3, "turns of each peer", at_least=1)
parser.add_argument("--json", action="store_true", help="print the results as JSON")

if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parser.parse(sys.argv[1:])

import numpy as np
import torch
import transformers
import yaml
from datasets import load_from_disk

from .configuration_nanogpt import NanoGPTConfig
from .throughput import flops_per_token, peak_flops

ROOT = Path(__file__).parent.parent
CHECKED = 20  # steps of the check
SETTLED = 20  # steps of a run before the first that counts
BOUNDS = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}  # nats: how far two losses of the check may lie apart
# the flags that nanoGPT's train.py has by the same names
SHARED = (
    *("batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias"),
    *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "weight_decay", "beta1", "beta2", "grad_clip"),
)


def run(*command, cwd: Path | None = None) -> tuple[str, str, float]:
    """What a Python process printed on stdout and stderr, and its seconds. Raises ValueError if it failed."""
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(f"{' '.join(map(str, command))[:99]} failed: {last[:300]}")
    return process.stdout, process.stderr, time.perf_counter() - started


def take_turns(peers: dict[str, Callable], rounds: int) -> dict[str, list]:
    """What each peer returned in each round. In a round, every peer has one turn."""
    results: dict[str, list] = {name: [] for name in peers}
    for turn in range(rounds):
        for name, peer in peers.items():
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(peer())
    return results


def copy_nanogpt(checkout: Path, folder: Path) -> None:
    """Copy nanoGPT's programs to where they may write. Raises ValueError if they are not there."""
    folder.mkdir()
    for name in ("train.py", "sample.py", "model.py", "configurator.py"):
        if not (checkout / name).is_file():
            raise ValueError(f"--nanogpt={checkout} is not a checkout of nanoGPT: it has no {name}")
        shutil.copy(checkout / name, folder)


def write_meta(folder: Path, size: int) -> None:
    """Tell nanoGPT's programs, in a data folder, how many tokens there are. To them, each token is some character."""
    folder.mkdir(parents=True)
    characters = ["\n", *(chr(0x4E00 + i) for i in range(1, size))]
    meta = {"vocab_size": size, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Training:
    """One recipe, trained by each of the peers. `folder` takes their data and their models."""

    def __init__(self, recipe: str, flags: str, steps: int, folder: Path):
        self.folder, self.steps = folder, steps
        self.flags = [recipe, *shlex.split(flags)]
        self.told = self.ours()["told"]  # this first run also prepares the data
        self.recipe = yaml.safe_load((folder / "ours" / "run.yaml").read_text(encoding="utf-8"))
        if self.recipe["optimizer"] != "adamw":
            raise ValueError(f"{recipe} has optimizer={self.recipe['optimizer']}: give --flags=--optimizer=adamw")
        # a step with a learning rate of 0 saves the model that all peers start from in the check
        idle = ["--learning_rate=0", "--min_lr=0", "--weight_decay=0"]
        self.ours(*idle, steps=1, out="start")
        self.config = NanoGPTConfig.from_pretrained(folder / "start")
        if self.config.vocab_size > 2**16:
            raise ValueError(f"{recipe} has {self.config.vocab_size} tokens, but nanoGPT's files hold 65,536 at most")
        self.recipe |= {key: getattr(self.config, key) for key in SHARED if hasattr(self.config, key)}
        streams = load_from_disk(folder / "data")
        for name, length in (("bench", None), ("window", self.config.block_size + 1)):
            # A stream as long as one window has no other window: all batches of all peers in the check are that one.
            data = folder / "nanogpt" / "data" / name
            write_meta(data, self.config.vocab_size)
            for split in streams:
                ids = streams[split].data.column("input_ids").combine_chunks().flatten().to_numpy()
                ids[:length].astype(np.uint16).tofile(data / f"{split}.bin")

    def ours(self, *flags: str, steps: int = 0, every: int = 10, out: str = "ours") -> dict:
        """Our trainer. "milliseconds" of a step, as the means of `every` steps; "losses" likewise; what was "told"."""
        steps, out_dir = steps or self.steps, self.folder / out
        shutil.rmtree(out_dir, ignore_errors=True)
        places = [f"--data_dir={self.folder / 'data'}", f"--out_dir={out_dir}"]
        length = [f"--max_iters={steps}", f"--eval_interval={steps}", "--eval_tokens=1", f"--log_interval={every}"]
        length += ["--always_save_checkpoint=true"]  # history.jsonl is written with the model
        printed, _, _ = run(ROOT / "train_accelerate.py", *self.flags, *places, *length, *flags)
        lines = (out_dir / "history.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
        tokens = self.step_tokens(out_dir)
        times = [tokens / entry["tokens_per_second"] * 1e3 for entry in entries]
        return {
            "milliseconds": times[SETTLED // every :],
            "losses": [entry["loss"] for entry in entries],
            "told": printed.splitlines()[0],
        }

    def step_tokens(self, out_dir: Path) -> int:
        recipe = yaml.safe_load((out_dir / "run.yaml").read_text(encoding="utf-8"))
        block_size = NanoGPTConfig.from_pretrained(out_dir).block_size
        return recipe["batch_size"] * recipe["gradient_accumulation_steps"] * block_size

    def nanogpt(self, *flags: str, data: str = "bench", steps: int = 0) -> dict:
        """nanoGPT's train.py: eager float32 on a CPU, as its CPU recipe says, and its own defaults on a GPU."""
        steps = steps or self.steps
        shared = [f"--{key}={self.recipe[key]}" for key in SHARED]
        fixed = [f"--dataset={data}", f"--max_iters={steps - 1}", "--eval_interval=1000000000", "--eval_iters=1"]
        device = [] if torch.cuda.is_available() else ["--device=cpu", "--compile=False", "--dtype=float32"]
        printed, _, _ = run(
            "train.py", *shared, *fixed, *device, "--log_interval=1", *flags, cwd=self.folder / "nanogpt"
        )
        found = re.findall(r"^iter \d+: loss (\S+), time (\S+)ms", printed, re.M)
        return {"losses": [float(loss) for loss, _ in found], "milliseconds": [float(ms) for _, ms in found][SETTLED:]}

    def loop(self, model: str, *, data: str = "bench", steps: int = 0, dtype: str = "", compiles: bool | None = None):
        """The bare loop over our model ("ours") or transformers' ("gpt2"), in the precision that our trainer chose.

        Our model also has the attention that our trainer chose.
        """
        settings = {
            "model": model,
            "start": str(self.folder / "start"),
            "tokens": str(self.folder / "nanogpt" / "data" / data / "train.bin"),
            "recipe": self.recipe,
            "steps": steps or self.steps,
            "dtype": dtype or self.dtype,
            "attention": "plain" if "plain attention" in self.told and model == "ours" and not dtype else "sdpa",
            "compile": "compile=True" in self.told if compiles is None else compiles,
        }
        path = self.folder / "loop.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        printed, _, _ = run("-m", "modeling_nanogpt.bare_loop", path)
        result = json.loads(printed)
        return result | {"milliseconds": result["milliseconds"][SETTLED:]}

    @property
    def dtype(self) -> str:
        return next(name for name in BOUNDS if name in self.told)

    def check(self, with_nanogpt: bool) -> dict[str, float]:
        """Train all peers from the same weights on the same window; returns how far their losses lie from ours.

        All of them compute in float32; our trainer also in the precision that it chose. Raises ValueError if a
        difference is beyond its bound.
        """
        window, start = self.folder / "nanogpt" / "data" / "window", self.folder / "start"
        ours = [f"--corpus={window}", f"--tokenizer={start}", f"--data_dir={self.folder / 'one-window'}"]
        ours += [f"--init_from={start}", "--dropout=0", f"--lr_decay_iters={self.recipe['lr_decay_iters']}"]
        float32: dict[str, Any] = {"data": "window", "steps": CHECKED, "dtype": "float32", "compiles": False}
        self.recipe["dropout"], dropout = 0.0, self.recipe["dropout"]
        expected = self.ours(*ours, "--dtype=float32", "--compile=false", steps=CHECKED, every=1)["losses"]
        found = {
            f"ours, {self.dtype}": self.ours(*ours, f"--dtype={self.dtype}", steps=CHECKED, every=1)["losses"],
            "bare loop": self.loop("ours", **float32)["losses"],
            "GPT2LMHeadModel": self.loop("gpt2", **float32)["losses"],
        }
        if with_nanogpt:
            self.write_checkpoint()
            flags = ["--init_from=resume", "--compile=False", "--dtype=float32"]
            found["nanoGPT"] = self.nanogpt(*flags, data="window", steps=CHECKED)["losses"]
        self.recipe["dropout"] = dropout
        apart = {name: max(abs(a - b) for a, b in zip(expected, each, strict=True)) for name, each in found.items()}
        for name, difference in apart.items():
            bound = BOUNDS[self.dtype if name.startswith("ours") else "float32"]
            if not difference <= bound:
                raise ValueError(f"the losses of {name} are {difference:.5f} nats from ours, but {bound} is allowed")
        return apart

    def write_checkpoint(self) -> None:
        """nanoGPT's ckpt.pt of the model at its start, with the recipe's settings of AdamW."""
        folder = self.folder / "ckpt"
        run("-m", "modeling_nanogpt.convert", self.folder / "start", folder, "--to", "ckpt")
        checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
        decaying, others = checkpoint["optimizer"]["param_groups"]
        decaying["weight_decay"], others["weight_decay"] = self.recipe["weight_decay"], 0.0
        decaying["betas"] = others["betas"] = (self.recipe["beta1"], self.recipe["beta2"])
        (self.folder / "nanogpt" / "out").mkdir()
        torch.save(checkpoint, self.folder / "nanogpt" / "out" / "ckpt.pt")


def bench_training(recipe: str, flags: str, also: list[str], steps: int, nanogpt: Path | None, rounds: int) -> dict:
    """Milliseconds of a step of each peer, and how far losses lie apart. Raises ValueError if a peer fails."""
    with tempfile.TemporaryDirectory() as name:
        if nanogpt:
            copy_nanogpt(nanogpt, Path(name) / "nanogpt")
        training = Training(recipe, flags, steps, Path(name))
        apart = training.check(with_nanogpt=nanogpt is not None)
        peers: dict[str, Callable] = {"ours": training.ours}
        for more in also:
            peers[f"ours {more}"] = lambda more=more: training.ours(*shlex.split(more))
        if nanogpt:
            peers["nanoGPT"] = training.nanogpt
        peers["bare loop over our model"] = lambda: training.loop("ours")
        peers["bare loop over GPT2LMHeadModel"] = lambda: training.loop("gpt2")
        results = take_turns(peers, rounds)
        rows = {peer: [statistics.median(each["milliseconds"]) for each in runs] for peer, runs in results.items()}
        report = {"milliseconds a step": rows, "nats apart in the check": apart, "ours ran as": training.told}
        peak = peak_flops(torch.device("cuda")) if torch.cuda.is_available() else None
        if peak:
            flops = training.step_tokens(training.folder / "ours") * flops_per_token(training.config)
            report["MFU"] = {peer: flops / statistics.median(times) * 1e3 / peak for peer, times in rows.items()}
            report["bytes of GPU memory"] = {peer: runs[0].get("memory") for peer, runs in results.items()}
        return report


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def bench_sampling(model: str, also: list[str], tokens: int, nanogpt: Path | None, rounds: int) -> dict:
    """Seconds of commands that draw ten samples of some tokens, and of commands that draw one token."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = ["--num_samples=10", f"--max_new_tokens={tokens}"]
        start_up = ["--num_samples=1", "--max_new_tokens=1"]

        def ours(*flags: str) -> float:
            return run("-m", "modeling_nanogpt.sample", model, *flags)[2]

        def theirs(*flags: str) -> float:
            device = [] if torch.cuda.is_available() else ["--device=cpu", "--dtype=float32"]
            return run("sample.py", "--out_dir=out", *device, *flags, cwd=folder / "nanogpt")[2]

        peers: dict[str, Callable] = {"ours": lambda: ours(*length), "ours, start-up": lambda: ours(*start_up)}
        for more in also:
            peers[f"ours {more}"] = lambda more=more: ours(*length, *shlex.split(more))
        if nanogpt:
            copy_nanogpt(nanogpt, folder / "nanogpt")
            run("-m", "modeling_nanogpt.convert", model, folder / "nanogpt" / "out", "--to", "ckpt")
            path = folder / "nanogpt" / "out" / "ckpt.pt"
            checkpoint = torch.load(path, weights_only=True)
            write_meta(folder / "nanogpt" / "data" / "bench", checkpoint["model_args"]["vocab_size"])
            torch.save(checkpoint | {"config": {"dataset": "bench"}}, path)
            peers["nanoGPT"] = lambda: theirs(*length)
            peers["nanoGPT, start-up"] = lambda: theirs(*start_up)
        seconds = take_turns(peers, rounds)
        medians = {peer: statistics.median(runs) for peer, runs in seconds.items()}
        generating = {
            peer: medians[peer] - medians[f"{peer}, start-up"] for peer in ("ours", "nanoGPT") if peer in medians
        }
        return {"seconds of the command": seconds, "seconds without start-up": generating}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    python = sys.version.split()[0]
    return f"{device}; Python {python}, torch {torch.__version__}, transformers {transformers.__version__}"


def show(report: dict) -> None:
    """Print a report. A figure of several rounds is their median, with the least and the most, beside nanoGPT's."""
    for title, values in report.items():
        print(f"{title}: {values}" if isinstance(values, str) else f"{title}:")
        for peer, numbers in values.items() if isinstance(values, dict) else ():
            if isinstance(numbers, list):
                middle = statistics.median(numbers)
                line = f"{middle:.4g} ({min(numbers):.4g} to {max(numbers):.4g})"
                if "nanoGPT" in values:
                    line += f", nanoGPT takes {statistics.median(values['nanoGPT']) / middle:.2f} times as long"
            else:
                line = "not measured" if numbers is None else f"{numbers:.4g}"
            print(f"  {peer:40} {line}")


def main(arguments: argparse.Namespace) -> None:
    if not Path(arguments.subject).exists():
        parser.error(f"{arguments.subject} is not there: name a recipe, or the folder of a model")
    nanogpt = Path(arguments.nanogpt) if arguments.nanogpt else None
    common = {"also": arguments.also, "nanogpt": nanogpt, "rounds": arguments.rounds}
    try:
        if arguments.what == "train":
            recipe = str(Path(arguments.subject).resolve())
            report = bench_training(recipe, arguments.flags, steps=arguments.steps, **common)
        else:
            report = bench_sampling(arguments.subject, tokens=arguments.max_new_tokens, **common)
    except ValueError as mistake:
        parser.error(str(mistake))
    report = {"machine": describe_machine()} | report
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


if __name__ == "__main__":
    main(arguments)
