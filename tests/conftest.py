"""Every test runs without the network, with a cache of its own and one thread. Fixtures: a run to look at, a Hub.

Modules that take seconds to import are imported in the functions below, because one of several pytest processes only
hands out the tests to the others.
"""

import os
import shutil
import signal
import tempfile

import pytest

# For this process and for those that its tests start. huggingface_hub reads the first two when it is first imported.
CACHE = tempfile.mkdtemp(prefix="tests-of-nanogpt-")
os.environ |= {"HF_HOME": CACHE, "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # fastest for models this small

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests send Ctrl-C to processes that they start


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of the tiny recipe. Tests only read it."""
    from support.tiny_run import train

    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub():
    """An empty Hub on loopback, for processes that a test starts with `hub.run`."""
    from support.hub import Hub

    with Hub() as hub:
        yield hub
