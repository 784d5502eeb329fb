"""Fetch the tests of the installed transformers release and run them on our classes, on CPU and without the network.

    python tests/conformance/suite.py [pytest arguments]

The source archive of a release holds tests/test_*.py, but not the folders and helpers beside them. STAND_INS has a
line for each of those that the tests import, and leads back to this file. A stand-in that leaves tests out skips them,
with a reason.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STAND_INS = {
    "__init__.py": "",
    "generation/test_utils.py": "from suite import GenerationTesterMixin\n",
    "exporters/test_export.py": "from suite import ExportTesterMixin\n",
    "utils/test_configuration_utils.py": "from suite import config_common_kwargs\n",
    "distributed_testing_utils.py": "from suite import (\n    run_distributed,\n    _get_distributed_backend,\n"
    "    _get_distributed_device_type,\n    _get_rank_device,\n    _set_rank_device,\n    _start_rank_processes,\n)\n",
}

# ---------------------------------------------------------------------------------------------------------------------
# What the archive lacks

# fields that a configuration inherits, with values that are not their defaults
config_common_kwargs = {"dtype": "float16", "return_dict": False, "output_hidden_states": True}


class GenerationTesterMixin:
    @unittest.skip("tests/generation is not in the source archive of transformers")
    def test_generation(self):
        """test_training_overfit and test_tp_generation generate here; tests/test_modeling.py tests the rest."""


class ExportTesterMixin:
    @unittest.skip("tests/exporters is not in the source archive of transformers")
    def test_exporters(self):
        """test_executorch.py tests the export itself."""


class PipelineTesterMixin:
    @unittest.skip("tests/pipelines is not in the source archive of transformers, and runs on models from the Hub")
    def test_pipelines(self):
        """There is no stand-in: test_pipeline_mixin.py cannot be imported without that folder."""


def run_distributed(world_size):
    """Make a function of (rank, ...) run once in each of `world_size` processes that form a group."""

    def decorate(function):
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                _start_rank_processes(_run_rank, (f"file://{folder}/group", world_size, function, args), world_size)

        return run

    return decorate


def _run_rank(rank, init_method, world_size, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))  # transformers reads them
    torch.distributed.init_process_group(_get_distributed_backend(), init_method, rank=rank, world_size=world_size)
    function(rank, *args)
    torch.distributed.destroy_process_group()


_start_rank_processes = torch.multiprocessing.spawn


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# The run


def fetch(release: str) -> Path:
    """The folder that holds the release's `tests`, downloaded on first use."""
    cache = ROOT / ".conformance"
    if not (cache / release).exists():
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download = ["download", "--quiet", "--no-deps", "--no-binary=transformers", f"--dest={folder}"]
            subprocess.run([sys.executable, "-m", "pip", *download, f"transformers=={release}"], check=True)
            with tarfile.open(Path(folder) / f"transformers-{release}.tar.gz") as archive:
                members = [member for member in archive if Path(member.name).parts[1:2] == ("tests",)]
                archive.extractall(folder, members, filter="data")
            unpacked = Path(folder) / f"transformers-{release}"
            for name, text in STAND_INS.items():
                stand_in = unpacked / "tests" / name
                if not stand_in.exists():
                    stand_in.parent.mkdir(exist_ok=True)
                    stand_in.write_text(text)
            unpacked.rename(cache / release)  # last, so that an interrupted download leaves nothing
    return cache / release


def main():
    tests = fetch(version("transformers"))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tests, HERE, ROOT))),  # for the processes that tests start as well
        "HF_HUB_OFFLINE": "1",  # a test that wants a file from the Hub fails at once
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "RUN_SLOW": "1",  # such tests take only seconds here, or say what they need
        # our own options are stricter about marks than transformers' tests are
        "PYTEST_ADDOPTS": "--override-ini=addopts= -W ignore::pytest.PytestUnknownMarkWarning --noconftest "
        "-rs --no-fold-skipped",
    }
    command = [sys.executable, "-m", "pytest", "tests/conformance/causal_lm.py", *sys.argv[1:]]
    sys.exit(subprocess.call(command, cwd=ROOT, env=env))


if __name__ == "__main__":
    main()
