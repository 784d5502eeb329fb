"""The short form of `make torture`: runs killed at random moments, and started again until they are done."""

import pytest

from support import torture
from support.needs import needs_time


def check(capfd, **how) -> None:
    went_well = torture.main(**how)
    table = capfd.readouterr().out
    assert went_well, table
    print(table)


def test_killed_runs_end_as_if_nothing_had_happened(capfd):
    check(capfd, runs=1, pairs=1, strikes=3, seed=2)


@needs_time
@pytest.mark.parametrize("seed", [1, 2])
def test_runs_of_20_rounds_end_as_if_nothing_had_happened(capfd, seed):
    check(capfd, runs=1, pairs=1, strikes=20, seed=seed)
