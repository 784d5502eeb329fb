"""Text from a trained model, a folder or a Hub id.

    python -m modeling_nanogpt.sample out/quickstart --prompt "def main(" --num_samples 3
    python -m modeling_nanogpt.sample user/my-gpt --prompt FILE:prompt.txt --temperature 0.8 --top_k 50 --seed 7

All samples are drawn as one batch, until each has ended or has max_new_tokens.
"""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

import modeling_nanogpt  # noqa: F401  from here on the auto classes know our models, with no remote code

from .sources import first_line


@torch.no_grad()
def continue_prompt(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, **sampling) -> torch.Tensor:
    """Prompts (B, T) int64 and up to max_new_tokens tokens after them, (B, T + N); `sampling` is for `generate`.

    While all fits into block_size, its cache is used. Beyond, each token is drawn from the last block_size tokens,
    read afresh, as in nanoGPT: positions are learned and absolute, so a sliding window changes all cached keys.
    A row that ends is filled with its end-of-text id.
    """
    block_size, eos = model.config.max_position_embeddings, model.generation_config.eos_token_id
    prompt_length = ids.shape[1]
    room = block_size - prompt_length
    if room > 0:
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, max_new_tokens=min(room, max_new_tokens), **sampling)
    ended = (ids[:, prompt_length:] == eos).any(dim=1) if eos is not None else torch.zeros(1, dtype=torch.bool)
    while ids.shape[1] < prompt_length + max_new_tokens and not ended.all():
        window = ids[:, -block_size:]
        mask = torch.ones_like(window)
        new = model.generate(window, attention_mask=mask, max_new_tokens=1, use_cache=False, **sampling)[:, -1]
        if eos is not None:
            new = new.masked_fill(ended, eos)
            ended = ended | (new == eos)
        ids = torch.cat([ids, new[:, None]], dim=1)
    return ids


def parse_arguments() -> argparse.Namespace:
    """The command line; a mistake in it is one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_nanogpt.sample",
        usage=argparse.SUPPRESS,  # it would stand above each error; the description shows it
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--prompt", default="\n", help="text to continue, or FILE:path (default: a newline)")
    parser.add_argument("--num_samples", type=int, default=3, help="default: 3")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens in a sample at most (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=200, help="from so many likeliest tokens; 0: all (default: 200)")
    parser.add_argument("--seed", type=int, default=1337, help="default: 1337")
    args = parser.parse_args()
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not least <= getattr(args, name) < 2**32:  # nan is not, either
            parser.error(f"--{name}={getattr(args, name)}, but it must be at least {least}, and below 2**32")
    if args.prompt.startswith("FILE:"):
        path = Path(args.prompt.removeprefix("FILE:"))
        try:
            args.prompt = path.read_bytes().decode("utf-8")
        except OSError as error:
            parser.error(f"--prompt: {path} cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            parser.error(f"--prompt: {path} is not UTF-8 text (at byte {error.start})")
    if args.revision and Path(args.model).exists():
        parser.error(f"--revision={args.revision} is for a Hub id, but {args.model} is on this machine")
    if not args.prompt:
        parser.error("--prompt is empty, and a model needs a token to go on from")
    try:
        which = {"revision": args.revision, "trust_remote_code": False}
        args.tokenizer = AutoTokenizer.from_pretrained(args.model, **which)
        args.model = AutoModelForCausalLM.from_pretrained(args.model, **which)
    except (OSError, ValueError, SafetensorError) as error:
        parser.error(f"{args.model} is not a folder or Hub id with a model and its tokenizer ({first_line(error)})")
    try:
        args.ids = args.tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # the class that the library raises where a vocabulary has no token for a character
        parser.error(f"--prompt holds what the tokenizer has no token for ({first_line(error)})")
    return args


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args = parse_arguments()
    model, tokenizer = args.model.eval(), args.tokenizer
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    set_seed(args.seed)
    prompt = args.ids.expand(args.num_samples, -1).to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    if args.temperature == 0:
        sampling = {"do_sample": False}
    for row in continue_prompt(model, prompt, args.max_new_tokens, **sampling).tolist():
        start = prompt.shape[1]
        end = row.index(tokenizer.eos_token_id, start) if tokenizer.eos_token_id in row[start:] else len(row)
        print(tokenizer.decode(row[:end]))
        print("-" * 15)


if __name__ == "__main__":
    main()
