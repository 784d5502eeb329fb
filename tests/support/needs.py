"""Marks for tests that need something that a machine may not have."""

import os
from shutil import which

import pytest

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)
needs_shakespeare = pytest.mark.skipif(
    "TINYSHAKESPEARE" not in os.environ, reason="TINYSHAKESPEARE names no text file"
)
needs_time = pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="takes a minute or more: SLOW_TESTS=1 runs it")


def node_packages(name: str) -> str | None:
    """The folder node_modules that NODE_MODULES names, if it holds a package and if `node` is there."""
    folder = os.environ.get("NODE_MODULES", "")
    return folder if which("node") and os.path.isdir(os.path.join(folder, name)) else None
