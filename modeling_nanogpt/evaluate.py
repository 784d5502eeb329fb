"""Say how well a model predicts a text, or how well it does on the tasks of lm-eval.

    python -m modeling_nanogpt.evaluate out/quickstart                             on the held-out part of its own text
    python -m modeling_nanogpt.evaluate out/quickstart --data_dir data/quickstart --split train
    python -m modeling_nanogpt.evaluate openai-community/gpt2 --text notes.txt
    python -m modeling_nanogpt.evaluate out/quickstart --tasks lambada_openai,hellaswag --limit 100
    accelerate launch -m modeling_nanogpt.evaluate out/quickstart                  on all GPUs together

The loss is the mean over all tokens, in nats. Each token is predicted once, from the tokens before it in its window;
windows are as long as the context and lie side by side. On a data_dir, this is the loss that training reports. An
end-of-text token is put before a text, if the tokenizer has one, so the first token of the text is predicted too.
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import yaml

from command_start import begin_command

from .command_line import CommandParser

NANOGPT_FLAGS = {"--out_dir": "name the model without a flag", "--init_from": "name the model without a flag"}
NANOGPT_FLAGS |= {"--dataset": "use --data_dir", "--eval_iters": "it is not needed, because all of a split is read"}

parser = CommandParser(
    "modeling_nanogpt.evaluate", usage="MODEL [--flag VALUE ...]", description=__doc__, instead=NANOGPT_FLAGS
)
parser.add_model()
parser.add_path("--data_dir", metavar="FOLDER", help="prepared tokens (default: those that the model was trained on)")
parser.add_argument("--split", choices=("train", "val"), default="val", help="split of data_dir (default: val)")
parser.add_path("--text", metavar="FILE", help="text file to evaluate on")
parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, separated by commas")
parser.add_path("--include_path", metavar="FOLDER", help="folder with tasks of your own for lm-eval")
parser.add_number("--limit", 0, "examples of each task; 0 means all of them")
parser.add_number("--batch_size", 8, "windows, or examples of a task, in one batch", at_least=1)
parser.add_number("--block_size", 0, "length of a window in tokens; 0 means the model's context")
parser.add_argument(
    "--dtype",
    choices=("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="arithmetic; auto is what training takes on this machine (default: auto)",
)
parser.add_argument("--card", action="store_true", help="write the results into the model card, MODEL/README.md")
parser.add_argument("--json", action="store_true", help="print the results as JSON")


def parse_arguments() -> argparse.Namespace:
    """The command line, with the folder of tokens that a model's run.yaml names. A mistake ends the process."""
    arguments = parser.parse(sys.argv[1:])
    folder = Path(arguments.model)
    given = [flag for flag in ("data_dir", "text", "tasks") if getattr(arguments, flag)]
    if len(given) > 1:
        parser.error(f"--{given[0]} and --{given[1]} cannot be combined: evaluate on one, then on the other")
    if arguments.card and not (folder / "README.md").is_file():
        parser.error(f"--card needs {folder / 'README.md'}, which is not there: leave out --card")
    if not given:
        arguments.data_dir = data_dir_of_run(folder)
    if arguments.data_dir:
        arguments.record = read_record(Path(arguments.data_dir), arguments.split)
    elif arguments.text:
        arguments.content = parser.read_text("--text", Path(arguments.text))
        if not arguments.content:
            parser.error(f"--text: {arguments.text} is empty: give a file with text")
    else:
        check_lm_eval(arguments)
    return arguments


def data_dir_of_run(folder: Path) -> str:
    """The data_dir that the run.yaml of a model names. A mistake ends the process."""
    try:
        data_dir = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["data_dir"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        parser.error(f"{folder} has no run.yaml that names its data_dir: give --data_dir, --text or --tasks")
    return str(data_dir)


def read_record(data_dir: Path, split: str) -> dict:
    """prepared.json: how many tokens and bytes each split has. A mistake ends the process."""
    try:
        record = json.loads((data_dir / "prepared.json").read_text(encoding="utf-8"))
        if int(record["tokens"][split]) > 1:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(
            f"--data_dir={data_dir} is not a folder that tokenization.prepare made: give another --data_dir, or --text"
        )
    parser.error(f"--data_dir={data_dir}: the split {split} has no token to predict: give another --split")


def check_lm_eval(arguments: argparse.Namespace) -> None:
    """End the process if lm-eval cannot do what was asked for."""
    if importlib.util.find_spec("lm_eval") is None:
        parser.error("--tasks needs lm-eval, which is not installed: pip install lm-eval")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--tasks runs in one process: start it with python, without a launcher")
    if arguments.include_path and not Path(arguments.include_path).is_dir():
        parser.error(f"--include_path={arguments.include_path} is not a folder")


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

import math
import re

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, tqdm
from accelerate.utils.memory import should_reduce_batch_size
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .arithmetic import choose_precision, move_to_accelerator
from .card_notes import write_results
from .scoring import read_split, sum_losses
from .sources import first_line, load_model

MEASURES = {  # key of the results -> its name in the model card
    "loss": "loss (nats a token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
    "word_perplexity": "word perplexity",
}


def join_processes(dtype: str) -> PartialState:
    """What this process knows of the others.

    Raises ValueError if the processes do not find each other, or if the device cannot compute in `dtype`.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != state.num_processes:
        raise ValueError(f"{started} processes were started, but each evaluates alone: set ACCELERATE_USE_CPU=true")
    if dtype == "float16" and state.device.type == "cpu":
        raise ValueError("--dtype=float16 needs a GPU: on a CPU use --dtype=float32 or --dtype=bfloat16")
    return state


def load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of the Hub, of a broken file, of what a tokenizer_config.json asks for
        raise ValueError(f"{name} has no tokenizer that can be read ({first_line(error)})") from None


def check_tokenizer(data_dir: Path, name: str, revision: str | None) -> None:
    """Raise ValueError if a data_dir holds the ids of another tokenizer than the model's."""
    theirs = load_tokenizer(str(data_dir), None).get_vocab()
    if load_tokenizer(name, revision).get_vocab() != theirs:
        raise ValueError(f"--data_dir={data_dir} was made with another tokenizer than {name} has: give --text instead")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The ids (N,) int64 of a text. If the tokenizer has a token that begins or ends texts, the ids begin with it.

    Raises ValueError if the tokenizer does not know a character.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    except Exception as error:  # the library raises its plainest class for a character without a token
        raise ValueError(f"--text has a character that the tokenizer does not know ({first_line(error)})") from None
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return np.array(ids if first is None else [first, *ids])


def choose_block_size(model: PreTrainedModel, asked: int) -> int:
    """The length of a window. Raises ValueError if the model's context is shorter."""
    context = getattr(model.config, "max_position_embeddings", None)
    if asked and context and asked > context:
        raise ValueError(f"--block_size={asked}, but the context of the model is {context} tokens")
    if not asked and not context:
        raise ValueError(f"a model of type {model.config.model_type} names no context: give --block_size")
    return asked or int(context or 0)


def evaluate(arguments: argparse.Namespace, device: torch.device) -> dict:
    """The results on a data_dir or on a text: loss in nats a token, perplexity, bits a byte, seconds.

    Raises ValueError if the tokens are not those of the model, or if the windows are longer than its context.
    """
    name, revision = arguments.model, arguments.revision
    if arguments.data_dir:
        check_tokenizer(Path(arguments.data_dir), name, revision)
        tokens = int(arguments.record["tokens"][arguments.split])
        size = (arguments.record.get("bytes") or {}).get(arguments.split)  # None in a data_dir that does not know it
        pieces = read_split(Path(arguments.data_dir), arguments.split, tokens)
        words = 0
        subject = f"{arguments.data_dir}, {arguments.split}"
    else:
        pieces = [encode(load_tokenizer(name, revision), arguments.content)]
        tokens = len(pieces[0])
        size = len(arguments.content.encode())
        words = len(re.split(r"\s+", arguments.content))  # as lm-eval counts them
        subject = arguments.text
        if tokens < 2:
            raise ValueError(f"--text: {arguments.text} has no token to predict: give a longer text")
    model = load_model(name, revision).float().eval()
    model.to(device)
    precision = choose_precision(arguments.dtype, model.config, device, run={})
    block_size = choose_block_size(model, arguments.block_size)
    highest = max(int(piece.max()) for piece in pieces if len(piece))
    if highest >= model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{subject} holds the token {highest}, but {name} does not have so many tokens")

    def bar(batches, total: int):
        return tqdm(batches, total=total, unit="batch", desc="evaluating", mininterval=0.5, leave=False)

    started = time.perf_counter()
    nats, targets = sum_losses(
        model,
        pieces,
        block_size=block_size,
        batch_size=arguments.batch_size,
        accelerator=Accelerator(mixed_precision=precision.value),
        progress=bar,
    )
    seconds = time.perf_counter() - started
    loss = nats / targets
    results = {"loss": loss, "perplexity": exponential(loss)}
    if words and size:  # every token of a text is predicted
        results |= {"bits_per_byte": nats / math.log(2) / size, "word_perplexity": exponential(nats / words)}
    elif size:  # the first token of a split is not predicted: it counts as much as the others do on average
        results |= {"bits_per_byte": loss / math.log(2) * tokens / size}
    return {"model": name, "subject": subject, "tokens": targets, "bytes": size, "seconds": seconds} | results


def exponential(value: float) -> float:
    """e to the power of a value, or infinity if a float cannot hold the result, for which math.exp raises an error."""
    return math.exp(value) if value < 700 else math.inf


def evaluate_tasks(arguments: argparse.Namespace) -> dict:
    """What lm-eval returns. Raises ValueError if there is no such task, or if its data cannot be fetched."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=arguments.include_path)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ValueError(
            f"--tasks={arguments.tasks}: lm-eval has no task {', '.join(unknown)}; `lm-eval ls` lists all"
        )
    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    model = load_model(arguments.model, arguments.revision)
    device = move_to_accelerator(model)
    harness_model = HFLM(model, tokenizer=tokenizer, batch_size=arguments.batch_size, device=str(device))
    try:
        results = lm_eval.simple_evaluate(
            harness_model, tasks=names, task_manager=manager, limit=arguments.limit or None, log_samples=False
        )
    except Exception as error:  # of the Hub, of `datasets`, of a task
        raise ValueError(f"--tasks={arguments.tasks}: lm-eval failed: {first_line(error)}") from None
    return results


def show(results: dict) -> None:
    line = f"{results['model']} on {results['subject']}: loss {results['loss']:.4f} nats a token"
    line += f", perplexity {results['perplexity']:.2f}"
    if "bits_per_byte" in results:
        line += f", {results['bits_per_byte']:.4f} bits a byte"
    if "word_perplexity" in results:
        line += f", word perplexity {results['word_perplexity']:.2f}"
    rate = results["tokens"] / results["seconds"]
    print(f"{line} ({results['tokens']:,} tokens in {results['seconds']:.1f} s: {rate:,.0f} tokens/s)")


def for_json(value):
    """The value, but None for a number that is not finite, because JSON has only finite numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_tasks(arguments: argparse.Namespace) -> None:
    """Evaluate on lm-eval's tasks, and print its table."""
    from lm_eval.utils import make_table

    results = evaluate_tasks(arguments)
    if arguments.card:
        for task, values in results["results"].items():
            numbers = {key.replace(",none", ""): value for key, value in values.items() if isinstance(value, float)}
            lines = {key: f"{value:.4f}" for key, value in numbers.items() if "stderr" not in key}
            write_results(Path(arguments.model) / "README.md", f"lm-eval: {task}", lines)
    print(json.dumps(results["results"], indent=2, default=str) if arguments.json else make_table(results))


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if arguments.tasks:
            return run_tasks(arguments)
        processes = join_processes(arguments.dtype)
        results = evaluate(arguments, processes.device)
    except ValueError as mistake:
        parser.error(str(mistake))
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        parser.error(f"out of memory at --batch_size={arguments.batch_size}: give a smaller one")
    if processes.is_main_process:
        if arguments.card:
            lines = {text: f"{results[key]:.4f}" for key, text in MEASURES.items() if key in results}
            write_results(Path(arguments.model) / "README.md", results["subject"], lines)
        if arguments.json:
            print(json.dumps({key: for_json(value) for key, value in results.items()}, indent=2))
        else:
            show(results)
    processes.destroy_process_group()


if __name__ == "__main__":
    main(arguments)
