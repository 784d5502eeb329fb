"""The commands as a shell starts them: they read their flags before torch is imported, under both of their names."""

import os
import subprocess
import sys

import pytest

from support import PATIENCE, ROOT

MODULES = {
    "train": "train_accelerate",
    "sample": "modeling_nanogpt.sample",
    "convert": "modeling_nanogpt.convert",
    "sizing": "modeling_nanogpt.sizing",
    "compare": "modeling_nanogpt.compare",
    "demo": "modeling_nanogpt.demo",
    "evaluate": "modeling_nanogpt.evaluate",
    "prepare": "tokenization.prepare",
}
PROGRAMS = {name: f"python -m {module}" for name, module in MODULES.items()} | {"train": "train_accelerate.py"}


def python(*words, folder):
    """Run Python in a folder. Returns exit status, stdout, the lines of stderr, and the names of imported modules."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = process.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    return process.returncode, process.stdout, said, imported


def by_module(name):
    return ["-m", MODULES[name]]


def by_script(name):
    """What an installed `nanogpt-...` does."""
    return ["-c", f"from command_start import {name}; {name}()"]


@pytest.mark.parametrize("start", [by_module, by_script])
@pytest.mark.parametrize("name", MODULES)
def test_help_and_a_mistyped_flag_are_answered_before_torch_is_imported(name, start, tmp_path):
    status, shown, said, imported = python(*start(name), "--help", folder=tmp_path)
    assert (status, said) == (0, [])
    assert shown.startswith(f"usage: {PROGRAMS[name]} ")
    assert not {"torch", "transformers"} & imported

    status, shown, said, imported = python(*start(name), "a", "b", "--tokeniser=c", folder=tmp_path)
    assert (status, shown) == (2, "")
    assert len(said) == 1 and said[0].startswith(f"{PROGRAMS[name]}: error: ")
    assert not {"torch", "transformers"} & imported


def test_a_default_in_the_help_is_the_real_one(tmp_path):
    shown = python("-m", "modeling_nanogpt.sample", "--help", folder=tmp_path)[1]
    assert "--top_k N " in shown and "(default: 200)" in shown
    assert "None" not in shown


def test_an_unknown_flag_is_answered_with_the_nearest(tmp_path):
    said = python("-m", "modeling_nanogpt.sample", "model", "--temprature=1", folder=tmp_path)[2]
    assert said[0].endswith("unknown flag --temprature: did you mean --temperature? --help lists all of them")


def test_a_package_of_someone_else_that_starts_as_a_command_still_gets_the_model(tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("from modeling_nanogpt import NanoGPTConfig\n")
    (tmp_path / "lab" / "run.py").write_text(
        "from transformers import AutoConfig\nprint(AutoConfig.for_model('nanogpt').model_type)\n"
    )
    status, shown, said, _ = python("-m", "lab.run", "modeling_nanogpt.sample", folder=tmp_path)
    assert (status, shown, said) == (0, "nanogpt\n", [])
