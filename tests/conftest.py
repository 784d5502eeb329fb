"""What every test shares: no network, and one thread each, which is fastest for models this small."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is first imported

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in every process that a test starts

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
