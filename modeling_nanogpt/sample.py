"""Generate text with a trained model.

    python -m modeling_nanogpt.sample out/quickstart --prompt "def main(" --num_samples 3
    python -m modeling_nanogpt.sample user/my-gpt --prompt FILE:prompt.txt --temperature 0.8 --top_k 50 --seed 7

All samples are generated as one batch. A sample ends with the end-of-text token, or after max_new_tokens.
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import sys
from pathlib import Path

from command_start import begin_command

from .command_line import CommandParser

MODEL = "name the model without a flag"
NOT_NEEDED = "it is not needed, because the command uses a GPU if the machine has one"
NANOGPT_FLAGS = {"--start": "use --prompt", "--out_dir": MODEL, "--init_from": MODEL}
NANOGPT_FLAGS |= dict.fromkeys(["--device", "--dtype", "--compile"], NOT_NEEDED)

parser = CommandParser(
    "modeling_nanogpt.sample", usage="MODEL [--flag VALUE ...]", description=__doc__, instead=NANOGPT_FLAGS
)
parser.add_path("model", metavar="MODEL", help="folder or Hub id of the model")
parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")
parser.add_argument(
    "--prompt", metavar="TEXT", default="\n", help="text to continue, or FILE:path (default: a newline)"
)
parser.add_number("--num_samples", 3, "number of samples", at_least=1)
parser.add_number("--max_new_tokens", 500, "longest continuation, in tokens", at_least=1)
parser.add_number("--temperature", 0.8, "randomness of the choice; 0 always takes the likeliest token")
parser.add_number("--top_k", 200, "number of likeliest tokens to choose from; 0 means all tokens")
parser.add_number("--seed", 1337, "seed of the random choices", below=2**32)


def parse_arguments() -> argparse.Namespace:
    """The command line, with the text of a prompt that is given as a file."""
    arguments = parser.parse(sys.argv[1:])
    if arguments.revision and Path(arguments.model).exists():
        parser.error(f"--revision={arguments.revision} is for a Hub id, but {arguments.model} is on this machine")
    if arguments.prompt.startswith("FILE:"):
        arguments.prompt = read_prompt(Path(arguments.prompt.removeprefix("FILE:")).expanduser())
    if not arguments.prompt:
        parser.error("--prompt is empty: a model needs at least one token to continue")
    return arguments


def read_prompt(path: Path) -> str:
    """The text of a file, every byte of it: line ends and blanks count."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        parser.error(f"--prompt: {path} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        parser.error(f"--prompt: {path} is not UTF-8 text (at byte {error.start})")


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from . import registration  # noqa: F401  the auto classes know our model from here on
from .sources import first_line


@torch.no_grad()
def continue_prompt(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, **sampling) -> torch.Tensor:
    """Prompts (B, T) int64 with up to N = max_new_tokens tokens after them, (B, T + N).

    `sampling` goes to `generate`. A row that ends early is filled up with its end-of-text id.

    The cache is used as long as everything fits into block_size. Positions are learned and absolute, so a window that
    slides changes every cached key. Beyond block_size, each token is therefore drawn from the last block_size tokens,
    computed anew, as in nanoGPT.
    """
    assert isinstance(model, GenerationMixin)  # as every causal language model is
    block_size, eos = model.config.max_position_embeddings, model.generation_config.eos_token_id
    prompt_length = ids.shape[1]
    room = block_size - prompt_length
    if room > 0:
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, max_new_tokens=min(room, max_new_tokens), **sampling)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    if eos is not None:
        ended = (ids[:, prompt_length:] == eos).any(dim=1)  # (B,)
    while ids.shape[1] < prompt_length + max_new_tokens and not ended.all():
        window = ids[:, -block_size:]
        mask = torch.ones_like(window)
        new = model.generate(window, attention_mask=mask, max_new_tokens=1, use_cache=False, **sampling)[:, -1]  # (B,)
        if eos is not None:
            new = new.masked_fill(ended, eos)
            ended = ended | (new == eos)
        ids = torch.cat([ids, new[:, None]], dim=1)
    return ids


def load(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder or Hub id; raises ValueError if one of them is missing or damaged."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{name} is not a folder or Hub id with a model and its tokenizer ({first_line(error)})"
        ) from None
    return model.eval(), tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """The ids (1, T) of a prompt; raises ValueError if the tokenizer has no token for a character of the prompt."""
    try:
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # the library raises its plainest class for a character without a token
        raise ValueError(
            f"--prompt has a character that the tokenizer does not know ({first_line(error)}): leave it out"
        ) from None


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, tokenizer = load(arguments.model, arguments.revision)
        prompt = encode(tokenizer, arguments.prompt)  # (1, T)
    except ValueError as mistake:
        parser.error(str(mistake))
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that mypy cannot follow
    set_seed(arguments.seed)
    prompts = prompt.expand(arguments.num_samples, -1).to(model.device)  # (B, T)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    if arguments.temperature == 0:
        sampling = {"do_sample": False}
    try:
        rows = continue_prompt(model, prompts, arguments.max_new_tokens, **sampling).tolist()
    except RuntimeError as error:
        if "probability" not in str(error):
            raise
        parser.error(f"{arguments.model} predicts nan or inf, so its training has diverged: take an earlier model")
    for row in rows:
        start, end = prompt.shape[1], len(row)
        if tokenizer.eos_token_id in row[start:]:
            end = row.index(tokenizer.eos_token_id, start)
        print(tokenizer.decode(row[:end]))
        print("-" * 15)


if __name__ == "__main__":
    main(arguments)
