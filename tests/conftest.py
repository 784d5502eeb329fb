"""No network, one thread each (fastest for models this small), and what a test is handed: a run to look at, a Hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in every process that a test starts

import pytest
import torch

from support.hub import Hub
from support.tiny_run import train


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of the tiny recipe, to read and never to write."""
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub():
    """An empty Hub on loopback, for processes that a test starts by its `run`."""
    with Hub() as hub:
        yield hub
