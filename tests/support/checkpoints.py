"""The ckpt.pt of nanoGPT and of its forks."""

from pathlib import Path

import torch


def write_ckpt(folder: Path, model, without=(), weights=None, legacy=False, args=None, **more) -> None:
    """A file as nanoGPT's train.py saves it, or as one of its forks does."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    model_args = {name: getattr(model.config, name) for name in names if name not in without} | (args or {})
    content = {"model": weights or model.state_dict(), "model_args": model_args, "optimizer": {}, "iter_num": 7} | more
    torch.save(content, folder / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
