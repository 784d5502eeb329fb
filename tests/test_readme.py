"""README and docs/ keep their word: their Python runs as it stands, their commands are accepted."""

import ast
import importlib.util
import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState, GradientState

from modeling_nanogpt.convert import PACKAGES, convert
from support import ROOT
from support.tiny_run import train
from train_accelerate import parse_arguments

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}


def blocks_of(page, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def commands_of_page(page):
    """The lines of a page's shell blocks."""
    lines = [line for block in blocks_of(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


(LOADING,) = blocks_of(PAGES["README.md"], "python")  # makes the model that other Python takes
PYTHON = list(dict.fromkeys([LOADING, *(code for page in PAGES.values() for code in blocks_of(page, "python"))]))
COMMANDS = [command for page in PAGES.values() for command in commands_of_page(page)]
MADE_BY_COMMANDS = (
    "out/quickstart-gpt2",
    "out/quickstart.gguf",
    "out/quickstart-onnx",
    "out/quickstart-web",
    "out/space",
    "out/mine",
    "out-nanogpt",
)


def commands_of(*program, among=COMMANDS):
    """What follows these words in the commands that begin with them."""
    words = [shlex.split(command, comments=True) for command in among]
    return [arguments[len(program) :] for arguments in words if tuple(arguments[: len(program)]) == program]


def needs_of(code):
    """The packages that a snippet needs."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a reader: a quickstart with the context of the recipe, but much smaller, and some texts."""
    folder = tmp_path_factory.mktemp("home")
    train(folder, out_dir=folder / "out/quickstart", tokenizer="bpe", vocab_size=300, block_size=128, max_iters=10)
    text = (folder / "corpus.txt").read_text().replace("slings\n", "slings\n\n")
    (folder / "notes.txt").write_text(text)
    for name in ("one", "two"):
        path = folder / "notes" / name / "a.md"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    # files of somebody who has trained with nanoGPT
    (folder / "input.txt").write_text(text)
    convert(str(folder / "out/quickstart"), folder / "out-shakespeare-char", to="ckpt", tokenizer=None)
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    """The folder of the reader, as the current one. What a snippet downloads or caches stays in it."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return home


@pytest.mark.parametrize("code", PYTHON, ids=[code.splitlines()[0] for code in PYTHON])
@pytest.mark.filterwarnings("ignore")  # the libraries warn about each other
def test_a_python_snippet_runs_and_writes_what_it_names(code, at_home, capsys):
    for package in needs_of(code):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    names = {}
    exec(LOADING, names)
    printed = len(capsys.readouterr().out)
    if code != LOADING:
        exec(code, names)
        printed = len(capsys.readouterr().out)
    assert printed or "print(" not in code
    for path in re.findall(r'"(out/[^"]+)"', code):
        assert Path(path).exists(), path


def test_the_tests_see_every_snippet_and_command():
    for page in PAGES.values():
        languages = set(re.findall(r"^```(\w+)", page, re.M))
        assert languages <= {"python", "bash", "js"}
    assert "model = " in LOADING and len(PYTHON) >= 7
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


def module_commands(page):
    among = commands_of_page(PAGES[page])
    return [words for words in commands_of("python", "-m", among=among) if words[0] != "pytest"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests import the module as well
@pytest.mark.parametrize("page", [page for page in sorted(PAGES) if module_commands(page)])
def test_the_module_commands_of_a_page_do_what_they_say(page, at_home, monkeypatch, capsys):
    for path in MADE_BY_COMMANDS:
        shutil.rmtree(at_home / path, ignore_errors=True)
        (at_home / path).unlink(missing_ok=True)
    left_out = []
    for module, *arguments in module_commands(page):
        needed = [package for word in arguments for package in PACKAGES.get(word, ())]
        needed += ["gradio"] if module == "modeling_nanogpt.demo" else []
        if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
            left_out += missing
            continue
        monkeypatch.setattr("sys.argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")
        assert capsys.readouterr().out
        for path in [word for word in arguments if word.startswith("out/")]:
            assert (at_home / path).exists()
    if left_out:
        pytest.skip(f"without the commands that need {', '.join(dict.fromkeys(left_out))}, this page was run")


def test_the_commands_that_set_up_name_what_is_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert commands_of("make") and {target for (target,) in commands_of("make")} <= set(targets)
    (extras,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    extras = re.findall(r"^(\w+) = ", extras, re.M)
    for install in re.findall(r'pip install (.*?"\.\[.*?\]")', "".join(PAGES.values())):
        assert shlex.split(install)[:2] == ["-c", "constraints.txt"] and (ROOT / "constraints.txt").exists()
        assert set(re.search(r"\[(.*)\]", install).group(1).split(",")) <= set(extras)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_index_lists_every_chapter():
    listed = re.findall(r"\]\(([^)#]+\.md)\)", PAGES["docs/README.md"])
    assert {os.path.normpath(f"docs/{page}") for page in listed} == set(PAGES) - {"docs/README.md"}
