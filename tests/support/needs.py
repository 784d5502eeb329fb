"""Marks for tests that need something that a machine may not have."""

import os

import pytest

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)
needs_shakespeare = pytest.mark.skipif(
    "TINYSHAKESPEARE" not in os.environ, reason="TINYSHAKESPEARE names no text file"
)
