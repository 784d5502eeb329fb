"""docs/slurm.sh: one command begins a run, goes on with it, and puts the job back into the queue in between."""

import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from modeling_nanogpt.training.checkpointing import list_checkpoints
from support import PATIENCE, ROOT
from support.runs import recipe_of

# Slurm's programs, as far as the script calls them. torchrun would only add a process between.
SRUN = """#!/bin/bash
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo other; fi
if [ "$1" = requeue ]; then echo "$2" >> "$REQUEUED"; fi
"""
TORCHRUN = f"""#!/bin/bash
echo "$@" >> "$LAUNCHED"
while [ "$1" != train_accelerate.py ]; do shift; done
shift
exec {sys.executable} {ROOT / "train_accelerate.py"} "$@"
"""
FLAGS = {"max_iters": 60, "eval_interval": 20, "save_interval": 10, "dropout": 0.2}


@pytest.fixture
def submit(tmp_path):
    """Start the job script with stand-ins for Slurm's programs."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    recipe = recipe_of(tmp_path, **FLAGS)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "localhost,other", "SLURM_NNODES": "2"}
    environment |= {"REQUEUED": str(tmp_path / "requeued"), "LAUNCHED": str(tmp_path / "launched")}

    def start(out_dir):
        command = ["bash", ROOT / "docs" / "slurm.sh", recipe, f"--out_dir={out_dir}"]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    return start


def test_the_job_goes_on_under_the_same_command(submit, tmp_path):
    whole = submit(tmp_path / "whole")
    assert "starting from scratch" in whole.communicate(timeout=PATIENCE)[0] and whole.returncode == 0
    first = submit(tmp_path / "out")
    while not list_checkpoints(tmp_path / "out"):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0 and "stopped by a signal after step" in said
    assert (tmp_path / "requeued").read_text() == "42\n"
    second = submit(tmp_path / "out")
    said, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0 and "going on after step" in said
    assert (tmp_path / "requeued").read_text() == "42\n"  # it has finished
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    launched = (tmp_path / "launched").read_text().splitlines()
    assert len(set(launched[1:])) == 1 and "--nnodes=2" in launched[0] and "localhost:29500" in launched[0]
