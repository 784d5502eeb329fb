"""The installed commands: each runs a module of the project as `python -m` does.

This file is in tokenization/ because importing anything from modeling_nanogpt/ imports torch, which takes seconds.
"""

import runpy
import sys


def train() -> None:
    run("train_accelerate")


def sample() -> None:
    run("modeling_nanogpt.sample")


def prepare() -> None:
    run("tokenization.prepare")


def convert() -> None:
    run("modeling_nanogpt.convert")


def evaluate() -> None:
    run("modeling_nanogpt.evaluate")


def compare() -> None:
    run("modeling_nanogpt.compare")


def demo() -> None:
    run("modeling_nanogpt.demo")


def sizing() -> None:
    run("modeling_nanogpt.sizing")


def run(module: str) -> None:
    """Run a module as its own program.

    While Python looks for the module, sys.argv and sys.orig_argv are what `python -m MODULE` would make them: from
    that, modeling_nanogpt sees that a command starts, and does not import torch before the command has read its flags.
    """
    sys.orig_argv = [sys.executable, "-m", module, *sys.argv[1:]]
    sys.argv = ["-m", *sys.argv[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
