"""Generate text with a trained model.

    python -m modeling_nanogpt.sample out/quickstart --prompt "def main(" --num_samples 3
    python -m modeling_nanogpt.sample user/my-gpt --prompt FILE:prompt.txt --temperature 0.8 --top_k 50 --seed 7

All samples of a prompt are generated as one batch. A sample ends with the end-of-text token, or after max_new_tokens.
Past the context of the model, half of the context is dropped at once, which is fast; --stride 1 drops one token at a
time, as nanoGPT does.
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import sys
import time
from pathlib import Path

from command_start import begin_command

from .command_line import CommandParser

MODEL = "name the model without a flag"
NOT_NEEDED = "it is not needed, because the command uses a GPU if the machine has one"
NANOGPT_FLAGS = {"--start": "use --prompt", "--out_dir": MODEL, "--init_from": MODEL}
NANOGPT_FLAGS |= dict.fromkeys(["--device", "--dtype"], NOT_NEEDED)
NANOGPT_FLAGS["--compile"] = "it is not needed, because a GPU reads each token by one CUDA graph"

parser = CommandParser(
    "modeling_nanogpt.sample", usage="MODEL [--flag VALUE ...]", description=__doc__, instead=NANOGPT_FLAGS
)
parser.add_model()
parser.add_argument(
    "--prompt",
    metavar="TEXT",
    action="append",
    help="text to continue, or FILE:path; several flags give several prompts (default: a newline)",
)
parser.add_number("--num_samples", 3, "number of samples of each prompt", at_least=1)
parser.add_number("--max_new_tokens", 500, "longest continuation, in tokens", at_least=1)
parser.add_number("--temperature", 0.8, "randomness of the choice; 0 always takes the likeliest token")
parser.add_number("--top_k", 200, "number of likeliest tokens to choose from; 0 means all tokens")
parser.add_number("--stride", 0, "tokens that are dropped at once from a full context; 0 means half of it")
parser.add_number("--seed", 1337, "seed of the random choices", below=2**32)
parser.add_argument("--stream", action="store_true", help="print each sample as it comes, one after the other")


def parse_arguments() -> argparse.Namespace:
    """The command line, with the texts of prompts that are given as files."""
    arguments = parser.parse(sys.argv[1:])
    for i, prompt in enumerate(arguments.prompt or ()):
        if prompt.startswith("FILE:"):
            path = Path(prompt.removeprefix("FILE:")).expanduser()
            arguments.prompt[i] = parser.read_text("--prompt", path)
        if not arguments.prompt[i]:
            parser.error("--prompt is empty: a model needs at least one token to continue")
    return arguments


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

from collections.abc import Iterator

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed
from transformers.utils import logging

from .arithmetic import choose_precision, move_to_accelerator
from .decoding import Diverged, choose_reader, continue_prompt, opening
from .sources import first_line, load_model

SEPARATOR = "-" * 15


def load(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder or Hub id.

    Raises ValueError if one of them is missing or damaged, or if the model has diverged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of the Hub, of a broken file, of what a tokenizer_config.json asks for
        raise ValueError(
            f"{name} is not a folder or Hub id with a model and its tokenizer ({first_line(error)})"
        ) from None
    model = load_model(name, revision).eval()
    for parameter, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"{name} has diverged in training: {parameter} is not finite; take an earlier checkpoint")
    return model, tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> torch.Tensor:
    """The ids (1, T) of a prompt, at least one; without a prompt, those with which a text may begin.

    Raises ValueError if the tokenizer does not know its characters.
    """
    if prompt is None:
        return torch.tensor([opening(tokenizer)])
    try:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # the library raises its plainest class for a character without a token
        raise ValueError(
            f"--prompt has a character that the tokenizer does not know ({first_line(error)}): leave it out"
        ) from None
    if not ids.numel():
        raise ValueError(f"--prompt={prompt[:40]!r} has no token in this tokenizer: give it words that it knows")
    return ids


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, tokenizer = load(arguments.model, arguments.revision)
        prompts = [encode(tokenizer, prompt) for prompt in arguments.prompt or [None]]  # (1, T) each
    except ValueError as mistake:
        parser.error(str(mistake))
    device = move_to_accelerator(model)
    # on a CPU, sampling stays in float32, so that it draws the tokens that transformers draws
    if device.type == "cuda" and choose_precision("auto", model.config, device, run={}).value == "bf16":
        model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps `to` in a way that mypy cannot follow
    set_seed(arguments.seed)
    rows = 1 if arguments.stream else arguments.num_samples
    longest = max(prompt.shape[1] for prompt in prompts)
    reader = choose_reader(model, rows, longest + arguments.max_new_tokens)
    started, count = time.perf_counter(), 0
    try:
        for prompt in (each for each in prompts for _ in range(arguments.num_samples // rows)):
            tokens = continue_prompt(
                model,
                prompt.expand(rows, -1).to(model.device),  # (B, T)
                arguments.max_new_tokens,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                stride=arguments.stride,
                reader=reader,
            )
            count += rows * (
                stream(tokenizer, prompt, tokens) if arguments.stream else show(tokenizer, prompt, tokens)
            )
    except Diverged:
        parser.error(
            f"{arguments.model} predicts nan or inf, so it has diverged in training: take an earlier checkpoint"
        )
    seconds = time.perf_counter() - started
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s", file=sys.stderr)


def show(tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: Iterator[torch.Tensor]) -> int:
    """Print all samples once they have ended; returns the number of new tokens in the longest one."""
    rows = torch.stack(list(tokens), dim=1).tolist()  # (B, N)
    for row in rows:
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        print(tokenizer.decode(prompt[0].tolist() + row[:end]))
        print(SEPARATOR)
    return len(rows[0])


def stream(tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: Iterator[torch.Tensor]) -> int:
    """Print a sample as it comes, as far as its words are complete; returns the number of new tokens."""
    printer, count = TextStreamer(tokenizer), 0
    printer.put(prompt)
    for token in tokens:
        count += 1
        if token.item() != tokenizer.eos_token_id:
            printer.put(token)
    printer.end()
    print(SEPARATOR)
    return count


if __name__ == "__main__":
    main(arguments)
