"""Convert a checkpoint between nanoGPT, this project and GPT-2.

    python -m modeling_nanogpt.convert out/quickstart out/quickstart-gpt2 --to gpt2
    python -m modeling_nanogpt.convert out-gpt2/ckpt.pt out/mine --tokenizer openai-community/gpt2

SOURCE is nanoGPT's ckpt.pt or the folder that holds it, or a folder or Hub id with a model of this project or of
GPT-2's architecture. DESTINATION is a new folder. Weights keep their dtype. --to says what DESTINATION will hold:

    nanogpt   a model of this project with its code: training and sampling here start from it
    gpt2      a stock GPT2LMHeadModel without code of ours: GGUF, ONNX and serving tools read it
    ckpt      nanoGPT's ckpt.pt: nanoGPT's own sample.py and train.py (init_from=resume) read it

ckpt.pt carries no tokenizer, so --tokenizer has to name one. For a model trained on GPT-2's tokens this is
openai-community/gpt2. For a model trained on the characters of input.txt, make the tokenizer first:

    python -m tokenization.prepare --corpus=input.txt --tokenizer=input.txt --data_dir=data/mine
    python -m modeling_nanogpt.convert out-char/ckpt.pt out/mine --tokenizer data/mine

(--tokenizer=char would add tokens for other characters, which nanoGPT does not have.)
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

from command_start import begin_command

from .command_line import CommandParser

parser = CommandParser("modeling_nanogpt.convert", usage="SOURCE DESTINATION [--flag VALUE ...]", description=__doc__)
parser.add_path("source", metavar="SOURCE", help="folder, Hub id or ckpt.pt to read")
parser.add_path("destination", metavar="DESTINATION", help="new folder to write")
parser.add_argument(
    "--to", choices=("nanogpt", "gpt2", "ckpt"), default="nanogpt", help="format to write (default: %(default)s)"
)
parser.add_path("--tokenizer", metavar="NAME", help="folder or Hub id of the tokenizer (default: the source's own)")
parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")


def parse_arguments() -> argparse.Namespace:
    return parser.parse(sys.argv[1:])


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_nanogpt import NanoGPTConfig
from .conversion import StateDict, config_to_gpt2, config_to_nanogpt, weights_to_gpt2, weights_to_nanogpt
from .modeling_nanogpt import NanoGPTForCausalLM
from .optimization import make_optimizer
from .sources import Misfit, Source, adopt_tokenizer, build_model, first_line, open_source

MAKE_A_FOLDER = (
    "`python -m tokenization.prepare --corpus=input.txt --tokenizer=input.txt --data_dir=data/mine` makes a tokenizer "
    "of the characters in input.txt, and --tokenizer=data/mine takes it"
)


def convert(source: str, destination: Path, to: str, tokenizer: str | None, revision: str | None = None) -> None:
    """Write the folder `destination`, whole or not at all; raises ValueError if that is not possible.

    `tokenizer` is a folder or Hub id, by default the source. A ckpt.pt of nanoGPT has no tokenizer and gets none.
    """
    if os.path.exists(destination) and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is there already and not empty: name a new folder")
    opened = open_source(source, revision)
    chosen = None
    if to != "ckpt":
        chosen = choose_tokenizer(opened, tokenizer, revision)
    if not opened.carries_tokenizer:
        print(f"{source}: the optimizer's state is left out", file=sys.stderr)
    try:
        with whole_folder(destination) as folder:
            config, weights = opened.read()
            if chosen is None:
                write_ckpt(folder, config, weights)
            elif to == "gpt2":
                write_gpt2(folder, config, weights, chosen)
            else:
                write_nanogpt(folder, config, weights, chosen)
    except Misfit as mistake:
        raise ValueError(f"{source}: {mistake}") from None
    except OSError as error:
        raise ValueError(f"{destination} cannot be written ({error.strerror}): name another folder") from None


def choose_tokenizer(source: Source, name: str | None, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, or else the source's own; raises ValueError if the model cannot use it."""
    if name is not None:
        if os.path.isfile(name):
            raise ValueError(f"--tokenizer={name} is a file, but it must be a folder or a Hub id: {MAKE_A_FOLDER}")
        revision = None  # --revision is the source's
    elif source.carries_tokenizer:
        name = source.name
    else:
        raise ValueError(
            f"{source.name} carries no tokenizer: name one by --tokenizer. For GPT-2's tokens this is "
            f"openai-community/gpt2; {MAKE_A_FOLDER}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of the Hub, of a broken file, of what a tokenizer_config.json asks for
        raise ValueError(f"{name} holds no tokenizer ({first_line(error)}): name another by --tokenizer") from None
    if not source.carries_tokenizer and tokenizer.num_special_tokens_to_add():
        added = " ".join(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))
        print(
            f"{name} puts {added} around a text, and nanoGPT does not: `python -m tokenization.prepare "
            f"--corpus=input.txt --tokenizer={name} --data_dir=data/mine` makes a tokenizer that does not either",
            file=sys.stderr,
        )
    if len(tokenizer) > source.config.vocab_size:
        raise ValueError(
            f"{name} has {len(tokenizer)} tokens, but {source.name} was trained on {source.config.vocab_size} at "
            "most: name its own tokenizer by --tokenizer"
        )
    return tokenizer


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `destination` once all is written. An error leaves neither."""
    staging = destination.with_name(destination.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        if destination.exists():
            destination.rmdir()  # an empty folder; Windows does not rename onto one
        os.rename(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_nanogpt(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of this project."""
    model = build_model(NanoGPTForCausalLM, config, weights, dtype_of(weights))
    adopt_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_gpt2(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A stock GPT-2 with exactly the tokenizer's tokens: what pads our vocabulary is cut off."""
    count = len(tokenizer)
    stock = build_model(
        GPT2LMHeadModel, config_to_gpt2(config, count), weights_to_gpt2(weights, count), dtype_of(weights)
    )
    adopt_tokenizer(stock, tokenizer)
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_ckpt(folder: Path, config: NanoGPTConfig, weights: StateDict) -> None:
    """What nanoGPT's train.py saves, at iteration 0, with an AdamW that has not made a step yet."""
    model_args = config_to_nanogpt(config)
    model = build_model(NanoGPTForCausalLM, config, weights, dtype_of(weights))
    optimizer = make_optimizer("adamw", model, learning_rate=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoint = {
        "model": weights_to_nanogpt(weights),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {},
    }
    torch.save(checkpoint, folder / "ckpt.pt")


def dtype_of(weights: StateDict) -> torch.dtype:
    """The dtype of a model's weights; if they differ, one that keeps all of them as they are."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        destination = Path(arguments.destination)
        convert(arguments.source, destination, arguments.to, arguments.tokenizer, arguments.revision)
    except ValueError as mistake:
        parser.error(str(mistake))
    print(f"{arguments.destination} holds {arguments.source} as {arguments.to}")


if __name__ == "__main__":
    main(arguments)
