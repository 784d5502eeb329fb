"""A bare PyTorch training loop, for comparison: what a model costs without Accelerate and without our trainer.

    python -m modeling_nanogpt.bare_loop SETTINGS.json

`bench` writes the settings: the folder of the model at its start, whether to train it as it is ("ours") or as
transformers' GPT2LMHeadModel ("gpt2"), the attention function, a file of token ids, and the flags of the recipe. The
loop prints the loss and the milliseconds of each step, and on a GPU the most memory that it took in bytes, as JSON.
"""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from . import registration  # noqa: F401  of our attention function
from .conversion import config_to_gpt2, weights_to_gpt2
from .modeling_nanogpt import NanoGPTForCausalLM
from .optimization import Schedule, make_optimizer
from .sources import build_model


def start_model(kind: str, folder: str, dropout: float) -> Any:
    """The model in a folder, or a GPT2LMHeadModel that computes the same."""
    model = NanoGPTForCausalLM.from_pretrained(folder, dropout=dropout, dtype=torch.float32)
    if kind == "ours":
        return model
    config, size = model.config, model.config.vocab_size
    stock = build_model(
        GPT2LMHeadModel, config_to_gpt2(config, size), weights_to_gpt2(model.state_dict(), size), torch.float32
    )
    if not config.bias:  # GPT-2 always has biases: they are zero, and must stay so
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_(not name.endswith(".bias"))
    return stock


def train(settings: dict) -> dict:
    """Losses in nats, and milliseconds a step."""
    flags = argparse.Namespace(**settings["recipe"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = start_model(settings["model"], settings["start"], flags.dropout).to(device).train()
    model.set_attn_implementation(settings["attention"])
    dtype = getattr(torch, settings["dtype"])
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    optimizer = make_optimizer(
        "adamw",
        model,
        learning_rate=flags.learning_rate,
        betas=(flags.beta1, flags.beta2),
        weight_decay=flags.weight_decay,
    )
    run = torch.compile(model, dynamic=False) if settings["compile"] else model
    ids = np.fromfile(settings["tokens"], dtype=np.uint16)
    schedule, draw, losses, times = Schedule.of(flags), np.random.default_rng(0), [], []
    before = time.perf_counter()
    for step in range(settings["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        for _ in range(flags.gradient_accumulation_steps):
            starts = draw.integers(len(ids) - flags.block_size, size=flags.batch_size)
            windows = np.stack([ids[start : start + flags.block_size + 1] for start in starts]).astype(np.int64)
            x, y = (torch.from_numpy(part.copy()).to(device) for part in (windows[:, :-1], windows[:, 1:]))  # (B, T)
            with autocast:
                loss = run(x, labels=y, shift_labels=y, use_cache=False).loss / flags.gradient_accumulation_steps
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip or math.inf)  # 0 turns clipping off
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * flags.gradient_accumulation_steps)  # of the last micro-batch, as nanoGPT says
        now = time.perf_counter()
        times.append((now - before) * 1e3)
        before = now
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"losses": losses, "milliseconds": times, "memory": memory}


if __name__ == "__main__":
    print(json.dumps(train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
