"""The short form of `make torture`: runs killed at random moments, and started again until they are done."""

import subprocess
import sys

import pytest

from support import ROOT, torture
from support.needs import needs_time


def test_killed_runs_end_as_if_nothing_had_happened(capfd):
    went_well = torture.main(runs=1, pairs=1, strikes=3, seed=2)
    table = capfd.readouterr().out
    assert went_well, table
    assert "2 of 2 runs as if never killed" in table


@needs_time
@pytest.mark.parametrize("flags", [["--seed=1"], ["--seed=2"], ["--seed=3", "--hub"]], ids=" ".join)
def test_runs_of_20_strikes_end_as_if_nothing_had_happened(flags):
    # a process of its own, because the processes that it forks know another Hub
    command = [sys.executable, ROOT / "tests" / "support" / "torture.py", "--runs=1", "--pairs=1", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
