"""The short form of `make torture`: a few runs killed at random moments, and resumed until they are done."""

from support import torture


def test_killed_runs_end_as_if_nothing_had_happened(capfd):
    went_well = torture.main(runs=2, pairs=1, seed=1)
    table = capfd.readouterr().out
    assert went_well, table
    assert "3 of 3 runs as if never killed" in table
