"""The README keeps its word: its Python runs as it stands, and its commands are taken by what they name."""

import ast
import importlib.util
import re
import runpy
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState, GradientState

from support import ROOT
from support.tiny_run import train
from train_accelerate import parse_arguments

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
LOADING, *SNIPPETS = PYTHON  # the first makes `model` and `tokenizer`, from which the others go on
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for command in block.replace("\\\n", " ").splitlines()
    if command
]
HIDDEN_NEEDS = {"torch.onnx.export": ("onnx", "onnxscript")}  # what a snippet needs without importing it


def commands_of(*program):
    """What follows these words in the README's commands that begin with them."""
    words = [shlex.split(command, comments=True) for command in COMMANDS]
    return [arguments[len(program) :] for arguments in words if tuple(arguments[: len(program)]) == program]


def needs_of(code):
    """The packages that a snippet needs."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
    for call, packages in HIDDEN_NEEDS.items():
        if call in code:
            yield from packages


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where a reader stands: a quickstart, much smaller than the recipe's but of its context, and some text."""
    folder = tmp_path_factory.mktemp("home")
    train(folder, out_dir=folder / "out/quickstart", tokenizer="bpe", vocab_size=300, block_size=128, max_iters=10)
    text = (folder / "corpus.txt").read_text().replace("slings\n", "slings\n\n")
    (folder / "notes.txt").write_text(text)
    for name in ("one", "two"):
        path = folder / "notes" / name / "a.md"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    """The reader's folder, this process in it; what a snippet downloads or caches stays there."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return home


@pytest.mark.parametrize("code", PYTHON, ids=[code.splitlines()[0] for code in PYTHON])
@pytest.mark.filterwarnings("ignore")  # of the libraries, about each other
def test_a_python_snippet_runs_and_writes_what_it_names(code, at_home, capsys):
    for package in needs_of(code):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    names = {}
    exec(LOADING, names)
    printed = len(capsys.readouterr().out)
    if code is not LOADING:
        exec(code, names)
        printed = len(capsys.readouterr().out)
    assert printed or "print(" not in code
    for path in re.findall(r'"(out/[^"]+)"', code):
        assert Path(path).exists(), path


def test_the_tests_see_every_snippet_and_command():
    assert len(PYTHON) + README.count("```bash\n") == len(re.findall(r"^```\w", README, re.M))
    assert "model = " in LOADING and len(SNIPPETS) >= 6
    programs = {re.sub(r"^([A-Z_]+=\w+ )*", "", command).split()[0] for command in COMMANDS}
    assert programs <= {"make", "python", "python3", ".", "pip", "accelerate", "torchrun"}


def train_commands():
    return [*commands_of("python", "train_accelerate.py"), *commands_of("accelerate", "launch", "train_accelerate.py")]


@pytest.mark.parametrize("arguments", train_commands(), ids=" ".join)
def test_a_training_command_names_a_recipe_and_flags_that_are_there(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    model_args, data_args, run_args = parse_arguments(arguments)
    given = dict(argument[2:].split("=") for argument in arguments if argument.startswith("--"))
    for key, value in given.items():
        (holder,) = (each for each in (model_args, data_args, run_args) if hasattr(each, key))
        assert str(getattr(holder, key)).lower() == value.lower() or float(value) == getattr(holder, key)


def module_commands():
    return [(module, *arguments) for module, *arguments in commands_of("python", "-m") if module != "pytest"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests import the module as well
@pytest.mark.parametrize("command", module_commands(), ids=" ".join)
def test_a_module_command_does_what_it_says(command, at_home, monkeypatch, capsys):
    module, *arguments = command
    shutil.rmtree(at_home / "out/quickstart-gpt2", ignore_errors=True)
    monkeypatch.setattr("sys.argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out
    for path in [word for word in arguments if word.startswith("out/")]:
        assert (at_home / path / "config.json").exists()


def test_the_commands_that_set_up_name_what_is_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert commands_of("make") and {target for (target,) in commands_of("make")} <= set(targets)
    (extras,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    extras = re.findall(r"^(\w+) = ", extras, re.M)
    for install in re.findall(r'pip install (.*?"\.\[.*?\]")', README):
        assert shlex.split(install)[:2] == ["-c", "constraints.txt"] and (ROOT / "constraints.txt").exists()
        assert set(re.search(r"\[(.*)\]", install).group(1).split(",")) <= set(extras)


def test_links_of_the_readme_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
