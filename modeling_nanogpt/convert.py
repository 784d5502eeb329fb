"""Convert a checkpoint between nanoGPT, this project and GPT-2.

    python -m modeling_nanogpt.convert out/quickstart out/quickstart-gpt2 --to gpt2
    python -m modeling_nanogpt.convert out/quickstart out/quickstart.gguf --to gguf
    python -m modeling_nanogpt.convert out/quickstart out/quickstart-web --to web --cdn
    python -m modeling_nanogpt.convert out-gpt2/ckpt.pt out/mine --tokenizer openai-community/gpt2

SOURCE is a folder or Hub id with a model of this project or of GPT-2's architecture, nanoGPT's ckpt.pt or the folder
that holds it, llm.c's model.bin, or a state dict, for which --n_head gives the number of heads. DESTINATION is a new
folder, or a new .gguf file. --to says what DESTINATION will hold:

    nanogpt   a model of this project with its code: training and sampling here start from it
    gpt2      a stock GPT2LMHeadModel without code of ours: serving tools read it
    ckpt      nanoGPT's ckpt.pt: nanoGPT's own sample.py and train.py (init_from=resume) read it
    gguf      one file with the tokenizer in it: llama.cpp and what is built on llama.cpp run it
    onnx      a stock GPT-2 as an ONNX file with a cache: transformers.js, onnxruntime and optimum run it
    web       a page that runs this ONNX file in the browser: any server of files and a static Space can serve it

Weights keep their dtype in nanogpt, gpt2 and ckpt. For the others, --dtype says how the file stores the matrices.

A ckpt.pt, a model.bin and a state dict do not hold a tokenizer, so --tokenizer has to name one. For a model trained on
GPT-2's tokens this is openai-community/gpt2. For a model trained on the characters of input.txt, first make the
tokenizer:

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
from contextlib import contextmanager, suppress
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

from command_start import begin_command

from .command_line import CommandParser
from .transformers_js import check_library

FORMATS = ("nanogpt", "gpt2", "ckpt", "gguf", "onnx", "web")
FILES = {"gguf": ".gguf"}  # formats that are one file, with its suffix; the others are folders
# Number formats of the matrices, the default first. Formats that are not here keep the dtype of the weights.
DTYPES = {"gguf": ("f32", "f16", "q8_0"), "onnx": ("fp32", "fp16", "q8"), "web": ("fp32", "fp16", "q8")}
# packages that a format needs
PACKAGES = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
PACKAGES["web"] = PACKAGES["onnx"]

parser = CommandParser("modeling_nanogpt.convert", usage="SOURCE DESTINATION [--flag VALUE ...]", description=__doc__)
parser.add_path("source", metavar="SOURCE", help="folder, Hub id or file to read")
parser.add_path("destination", metavar="DESTINATION", help="new folder to write; for gguf, a new .gguf file")
parser.add_argument("--to", choices=FORMATS, default="nanogpt", help="format to write (default: %(default)s)")
parser.add_argument(
    "--dtype",
    metavar="NAME",
    help="number format of the matrices: f32 (default), f16 or q8_0 for gguf; fp32 (default), fp16 or q8 for onnx and "
    "web",
)
parser.add_path("--tokenizer", metavar="NAME", help="folder or Hub id of the tokenizer (default: the source's own)")
parser.add_argument(
    "--n_head", metavar="N", type=int, help="number of heads of a state dict, which does not say this number"
)
parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")
parser.add_path(
    "--node_modules", metavar="FOLDER", help="folder of npm packages, to copy transformers.js for --to=web"
)
parser.add_argument("--cdn", action="store_true", help="let the page of --to=web load transformers.js from a CDN")


def check_request(destination: Path, to: str, *, dtype: str | None, node_modules: str | None, cdn: bool) -> None:
    """Raise ValueError if a flag does not fit the format, or if the destination is there already."""
    check_destination(destination, to)
    check_dtype(dtype, to)
    if to == "web":
        check_library(node_modules, cdn)
    elif node_modules or cdn:
        raise ValueError(f"--node_modules and --cdn are for --to=web: leave them out for --to={to}")


def check_destination(destination: Path, to: str) -> None:
    """Raise ValueError if the destination is there already, or if its name or a package does not fit the format."""
    if to in FILES:
        if destination.suffix != FILES[to]:
            raise ValueError(f"--to={to} writes one file: name a new {FILES[to]} file, not {destination}")
        if os.path.lexists(destination):
            raise ValueError(f"{destination} is there already: name a new file")
    elif os.path.exists(destination) and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is there already and not empty: name a new folder")
    for package in PACKAGES.get(to, ()):
        if find_spec(package) is None:
            raise ValueError(f"--to={to} needs the package {package}: pip install {' '.join(PACKAGES[to])}")


def check_dtype(dtype: str | None, to: str) -> None:
    """Raise ValueError if a format does not have the number format that is given."""
    choices = DTYPES.get(to)
    if dtype is not None and choices is None:
        raise ValueError(f"--dtype={dtype}, but --to={to} keeps the dtype of the weights: leave out --dtype")
    if dtype is not None and choices is not None and dtype not in choices:
        raise ValueError(f"--dtype={dtype}, but for --to={to} it must be one of {', '.join(choices)}")


def parse_arguments() -> argparse.Namespace:
    given = parser.parse(sys.argv[1:])
    try:  # as convert() does, but before torch is imported
        check_request(
            Path(given.destination), given.to, dtype=given.dtype, node_modules=given.node_modules, cdn=given.cdn
        )
    except ValueError as mistake:
        parser.error(str(mistake))
    return given


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_nanogpt import NanoGPTConfig
from .conversion import StateDict, config_to_gpt2, config_to_nanogpt, weights_to_gpt2, weights_to_nanogpt
from .gguf_export import read_vocabulary, write_gguf
from .modeling_nanogpt import NanoGPTForCausalLM
from .onnx_export import check_size, write_onnx
from .optimization import make_optimizer
from .sources import Misfit, Source, adopt_tokenizer, build_model, find_file, first_line, open_source
from .web_page import describe, write_page

MAKE_A_FOLDER = (
    "`python -m tokenization.prepare --corpus=input.txt --tokenizer=input.txt --data_dir=data/mine` makes a tokenizer "
    "of the characters in input.txt, and --tokenizer=data/mine takes it"
)


def convert(
    source: str,
    destination: Path,
    to: str,
    tokenizer: str | None,
    revision: str | None = None,
    dtype: str | None = None,
    n_head: int | None = None,
    node_modules: str | None = None,
    cdn: bool = False,
) -> None:
    """Write `destination`, whole or not at all; raises ValueError if that is not possible.

    `tokenizer` is a folder or Hub id, by default the source; the format ckpt does not hold a tokenizer. `dtype` is one
    of DTYPES. A web page copies transformers.js from the folder `node_modules`, or with `cdn` loads it from a CDN.
    """
    check_request(destination, to, dtype=dtype, node_modules=node_modules, cdn=cdn)
    dtype = dtype or DTYPES.get(to, ("",))[0]
    opened = open_source(source, revision, n_head)
    if n_head not in (None, opened.config.n_head):
        raise ValueError(f"--n_head={n_head}, but {source} has n_head={opened.config.n_head}: leave it out")
    chosen = None if to == "ckpt" else choose_tokenizer(opened, tokenizer, revision)
    if chosen and to == "gguf":
        read_vocabulary(chosen)  # before weights are read: a ValueError if llama.cpp does not know such a tokenizer
    if to in ("onnx", "web"):
        check_size(opened.config)
    if opened.has_optimizer:
        print(f"{source}: the optimizer's state is left out", file=sys.stderr)
    try:
        with whole(destination) as path:
            config, weights = opened.read()
            if chosen is None:
                write_ckpt(path, config, weights)
            elif to == "gguf":
                write_gguf(path, destination.stem, config, weights, chosen, dtype)
            elif to == "gpt2":
                write_gpt2(path, config, weights, chosen)
            elif to == "onnx":
                write_onnx_gpt2(path, config, weights, chosen, dtype)
            elif to == "web":
                write_onnx_gpt2(path / "model", config, weights, chosen, dtype)
                card = find_file(source, "README.md", revision) if opened.carries_tokenizer else None
                facts = describe(config, Path(card).read_text(encoding="utf-8") if card else "")
                write_page(path, os.path.basename(os.path.abspath(source)), facts, node_modules)
            else:
                write_nanogpt(path, config, weights, chosen)
    except Misfit as mistake:
        raise ValueError(f"{source}: {mistake}") from None
    except OSError as error:
        kind = "file" if to in FILES else "folder"
        raise ValueError(f"{destination} cannot be written ({error.strerror}): name another {kind}") from None


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
def whole(destination: Path) -> Iterator[Path]:
    """A path for a file or a folder, which becomes `destination` once all is written. An error leaves neither."""
    staging = destination.with_name(destination.name + ".partial")
    remove(staging)
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        if destination.exists():
            destination.rmdir()  # an empty folder; Windows does not rename onto one
        os.rename(staging, destination)
    finally:
        remove(staging)


def remove(path: Path) -> None:
    """Remove a folder or a file, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_nanogpt(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of this project."""
    model = build_model(NanoGPTForCausalLM, config, weights, dtype_of(weights))
    adopt_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_gpt2(
    config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> GPT2LMHeadModel:
    """A stock GPT-2 with exactly the tokenizer's tokens, without the rows that pad our vocabulary."""
    count = len(tokenizer)
    stock = build_model(GPT2LMHeadModel, config_to_gpt2(config, count), weights_to_gpt2(weights, count), dtype)
    adopt_tokenizer(stock, tokenizer)
    return stock


def write_gpt2(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A stock GPT-2, in the dtype of the weights."""
    stock = make_gpt2(config, weights, tokenizer, dtype_of(weights))
    if tokenizer.unk_token is None:
        tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2's own; CTranslate2 fails without an unknown token
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_onnx_gpt2(
    folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """A stock GPT-2 with its network as an ONNX file."""
    stock = make_gpt2(config, weights, tokenizer, torch.float32)
    (folder / "onnx").mkdir(parents=True)
    write_onnx(folder / "onnx", stock, dtype)
    # What save_pretrained of the model would write beside the weights. transformers.js loads the dtype named here.
    stock.config.architectures = ["GPT2LMHeadModel"]
    stock.config.update({"transformers.js_config": {"dtype": dtype}})
    stock.config.save_pretrained(folder)
    stock.generation_config.save_pretrained(folder)
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
    folder.mkdir()
    torch.save(checkpoint, folder / "ckpt.pt")


def dtype_of(weights: StateDict) -> torch.dtype:
    """The dtype of a model's weights; if they differ, one that keeps all of them as they are."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        destination = Path(arguments.destination)
        convert(
            arguments.source,
            destination,
            to=arguments.to,
            tokenizer=arguments.tokenizer,
            revision=arguments.revision,
            dtype=arguments.dtype,
            n_head=arguments.n_head,
            node_modules=arguments.node_modules,
            cdn=arguments.cdn,
        )
    except ValueError as mistake:
        parser.error(str(mistake))
    print(f"{arguments.destination} holds {arguments.source} as {arguments.to}")


if __name__ == "__main__":
    main(arguments)
