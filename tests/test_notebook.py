"""The notebook runs from its first cell to its last. Only its flags are replaced, by those of a tiny run."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

from support import PATIENCE, ROOT
from support.needs import needs_time
from support.texts import write_words
from support.tiny_run import TINY

NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What each cell printed, with the folder in which they ran, one after the other, in a process of their own."""
    folder = tmp_path_factory.mktemp("notebook")
    write_words(folder / "corpus.txt")
    tiny = TINY | {"corpus": "corpus.txt", "data_dir": "data", "out_dir": "out"}
    flags = ["hub_configs/quickstart.yaml", *(f"--{key}={value}" for key, value in tiny.items())]
    cells = ["".join(cell["source"]) for cell in CODE]
    (place,) = [place for place, cell in enumerate(CODE) if "parameters" in cell["metadata"].get("tags", [])]
    cells[place] = f"import torch\n\nSTEPS, FLAGS = 20, {flags!r}"
    process = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(cells)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return folder, json.loads(process.stdout.splitlines()[-1])


# Runs cells in one namespace. The last line that it prints is what each of them printed.
RUN = """
import contextlib, io, json, sys

names, printed = {"__name__": "__main__"}, []
for number, cell in enumerate(json.loads(sys.argv[1])):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(cell, f"cell {number}", "exec"), names)
    printed.append(said.getvalue())
print()
print(json.dumps(printed))
"""


@needs_time
def test_every_cell_runs_and_says_what_it_should(executed):
    folder, printed = executed
    _, _, training, tokens, plot, sample, numbers = printed
    assert "step 20: train loss " in training
    assert "|" in tokens
    assert plot == ""
    assert sample.startswith("def ") or len(sample.strip()) > 20
    assert "bits a byte" in numbers and "memory to train" in numbers
    assert (folder / "out" / "README.md").exists() and (folder / "data" / "prepared.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "data", "out"]


def test_the_recipe_and_the_flags_of_the_notebook_are_there(monkeypatch, tmp_path):
    from train_accelerate import parse_arguments

    monkeypatch.chdir(tmp_path)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("".join(next(cell for cell in CODE if cell["metadata"].get("tags"))["source"]), names)
    model_args, data_args, run_args = parse_arguments(names["FLAGS"])
    assert run_args.max_iters == names["STEPS"] and data_args.corpus == "python-stdlib"
    assert model_args.n_embd == 192


def test_the_notebook_is_one_that_jupyter_opens():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in CODE:  # what is in the repository was run without an error
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        compile("".join(cell["source"]), "cell", "exec")
