"""Checkpoints from and to nanoGPT and GPT-2.

    python -m modeling_nanogpt.convert SOURCE DESTINATION [--to nanogpt|gpt2|ckpt] [--tokenizer NAME] [--revision NAME]

SOURCE is nanoGPT's ckpt.pt or the folder it is in, or a folder or Hub id with a model of this project or of GPT-2's
architecture. DESTINATION is a new folder, and --to says what it will hold:

    nanogpt   a model of this project, with its code: what training and sampling here take (the default)
    gpt2      a stock GPT2LMHeadModel, which needs no code of ours: for GGUF, ONNX and serving tools
    ckpt      nanoGPT's ckpt.pt, which its own sample.py and train.py (init_from=resume) take

--tokenizer is for a source that carries none, as ckpt.pt: gpt2, if it was trained on GPT-2's tokens; the text file, if
on its characters; or a folder or Hub id. --revision is a branch, tag or commit of a source that is a Hub id. Weights
keep their dtype.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import tiktoken
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from .configuration_nanogpt import NanoGPTConfig
from .conversion import StateDict, config_to_gpt2, config_to_nanogpt, weights_to_gpt2, weights_to_nanogpt
from .modeling_nanogpt import NanoGPTForCausalLM
from .optimization import make_optimizer
from .sources import adopt_tokenizer, build_model, first_line, open_source


def read_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer, that of a folder or Hub id, or the characters of a text file, numbered as nanoGPT does."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if Path(name).is_file():
        try:
            return character_tokenizer(sorted(set(Path(name).read_bytes().decode("utf-8"))))
        except UnicodeDecodeError as error:
            raise ValueError(f"--tokenizer={name} is not UTF-8 text (at byte {error.start})") from None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} holds no tokenizer: name one by --tokenizer ({first_line(error)})") from None


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer, made from what tiktoken knows of it; raises ValueError where it cannot be fetched."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise ValueError(f"--tokenizer=gpt2: tiktoken cannot fetch its vocabulary ({first_line(error)})") from None
    end = "<|endoftext|>"
    converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[end])
    converter.load_tiktoken_bpe = lambda vocab_file: encoding._mergeable_ranks  # there is no file to read them from
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def character_tokenizer(characters: list[str]) -> PreTrainedTokenizerFast:
    """One token for each character and none besides, as the model has no more: other characters are refused."""
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False)


def write_nanogpt(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of ours, which never generates an id beyond the tokenizer's."""
    model = build_model(NanoGPTForCausalLM, config, weights, weights["transformer.wte.weight"].dtype)
    adopt_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_gpt2(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A stock GPT-2 with as many tokens as the tokenizer has: what our vocabulary is padded with is cut off."""
    count, dtype = len(tokenizer), weights["transformer.wte.weight"].dtype
    model = build_model(GPT2LMHeadModel, config_to_gpt2(config, count), weights_to_gpt2(weights, count), dtype)
    adopt_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_ckpt(folder: Path, config: NanoGPTConfig, weights: StateDict, tokenizer: None) -> None:
    """What nanoGPT's train.py saves, at iteration 0 and with an AdamW that has not stepped yet."""
    model_args = config_to_nanogpt(config)
    model = build_model(NanoGPTForCausalLM, config, weights, weights["transformer.wte.weight"].dtype)
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


WRITERS = {"nanogpt": write_nanogpt, "gpt2": write_gpt2, "ckpt": write_ckpt}


def convert(source: str, destination: Path, to: str, tokenizer_name: str | None, revision: str | None = None) -> None:
    """Write the destination from the source, whole or not at all; raises ValueError where that cannot be."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is there already and not empty: name a new folder")
    opened = open_source(source, revision)
    config = opened.config
    tokenizer = None
    if to != "ckpt":  # nanoGPT keeps no tokenizer with its checkpoints
        if not (opened.carries_tokenizer or tokenizer_name):
            raise ValueError(f"{source} carries no tokenizer: name one by --tokenizer")
        tokenizer = read_tokenizer(tokenizer_name) if tokenizer_name else read_tokenizer(source, revision)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, and the model {config.vocab_size}")
        tokenizer.model_max_length = config.block_size
    if not opened.carries_tokenizer:
        print(f"{source}: the optimizer's state is left out", file=sys.stderr)
    staging = destination.with_name(destination.name + ".partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        WRITERS[to](staging, config, opened.weights(), tokenizer)
        if destination.exists():
            destination.rmdir()
        os.rename(staging, destination)
    except OSError as error:
        raise ValueError(f"{destination} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        prog="python -m modeling_nanogpt.convert",
        usage=argparse.SUPPRESS,  # it would stand above each error; the description shows it
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION", type=Path)
    parser.add_argument("--to", choices=WRITERS, default="nanogpt", help="default: nanogpt")
    parser.add_argument("--tokenizer", help="default: the source's own")
    parser.add_argument("--revision", metavar="NAME", help="default: main")
    args = parser.parse_args()
    try:
        convert(args.source, args.destination, args.to, args.tokenizer, args.revision)
    except ValueError as mistake:
        parser.error(" ".join(str(mistake).split()))
    print(f"{args.destination} holds {args.source} as {args.to}")


if __name__ == "__main__":
    main()
