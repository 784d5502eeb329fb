"""Processes that start at once, because a server forks them that has imported the libraries before."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from unittest.mock import patch

from support import ROOT

# One server serves all tests of a pytest process, so what any of them needs is named here: the trainer, the prepare
# command, and matplotlib, with which each save draws its losses.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["support.runs", "tokenization.prepare", "matplotlib.figure", "matplotlib.backends.backend_agg"]
)
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


def fork(function, *arguments) -> BaseProcess:
    """A process that calls the function, already started."""
    process = FORKS.Process(target=function, args=arguments)
    # The first call starts the server. Before Python 3.13 it looks for modules along this path alone, and passes over
    # in silence what it does not find.
    with patch.dict(os.environ, PYTHONPATH=PATH):
        process.start()
    return process
