"""What pyproject.toml declares is true, and the installed package works without the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import packages_distributions
from types import SimpleNamespace

import pytest

from support import PATIENCE, ROOT

DECLARED = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = [*ROOT.glob("*.py"), *ROOT.glob("modeling_nanogpt/**/*.py"), *ROOT.glob("tokenization/**/*.py")]
SCRIPTS = [*ROOT.glob("docs/**/*.py"), *ROOT.glob("tests/**/*.py")]
OURS = {"train_accelerate", "command_start", "modeling_nanogpt", "tokenization", "hub_configs", "support"}
# tests/conformance/ puts `suite` and `tests` on the path: transformers' own tests.
OURS |= {"suite", "tests", *(path.stem for path in ROOT.glob("docs/*.py"))}


def canonical(name: str) -> str:
    """The name of a distribution, as registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def floors(text: str) -> dict[str, str]:
    """Each requirement in a part of pyproject.toml, and its lowest version; of two lines, that of the last."""
    return {
        canonical(name): floor for name, floor in re.findall(r'"([\w.-]+)(?:\[\w+\])?[>=]=([\d.]+)(?:; [^"]*)?"', text)
    }


(BASE,) = (floors(part) for part in re.findall(r"^dependencies = \[(.*?)^\]", DECLARED, re.M | re.S))
(SECTION,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)\n\n", DECLARED, re.M | re.S)
EXTRAS = {name: floors(part) for name, part in re.findall(r"^(\w+) = \[([^]]*)\]", SECTION, re.M)}


def imported_by(paths, indented: bool) -> dict[str, set]:
    """The distributions that files import at the top, or in an indented line, and the files."""
    distributions, users = packages_distributions(), {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if bool(getattr(node, "col_offset", 0)) is not indented:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names):
                distribution = canonical(distributions.get(name, [name])[0])
                users.setdefault(distribution, set()).add(path.name)
    return users


def undeclared(users: dict[str, set], *declared: dict) -> dict[str, set]:
    return {name: files for name, files in users.items() if not any(name in each for each in declared)}


def test_what_the_packages_import_is_a_dependency():
    users = imported_by(PACKAGES, indented=False)
    assert {"torch", "transformers", "pyyaml"} <= users.keys()
    assert undeclared(users, BASE) == {}


def test_what_the_packages_import_only_if_it_is_there_is_an_extra():
    users = imported_by(PACKAGES, indented=True)
    assert {"datasets", "zstandard", "gguf"} <= users.keys()
    assert undeclared(users, BASE, *(EXTRAS[name] for name in ("zstd", "fast", "clients", "demo"))) == {}


@pytest.mark.parametrize("indented", [False, True])
def test_what_tests_and_scripts_import_is_declared(indented):
    users = imported_by(SCRIPTS, indented=indented)
    assert {"torch"} <= users.keys()
    assert undeclared(users, BASE, *EXTRAS.values()) == {}


def numbers(version: str) -> list[int]:
    """A version without the zeros at its end, because 5.0 is 5.0.0."""
    parts = [int(part) for part in version.split(".")]
    while parts[-1] == 0:
        parts.pop()
    return parts


def test_ci_runs_the_lowest_version_of_each_requirement():
    lines = (ROOT / ".ci" / "floor.txt").read_text(encoding="utf-8")
    runs = dict(re.findall(r"^([\w-]+)==([\d.]+)$", lines, re.M))
    declared = dict(BASE)
    for extra in EXTRAS.keys() - {"dev"}:
        declared |= EXTRAS[extra]
    del declared["torch"]  # floor.txt says why
    assert {name: numbers(runs[name]) for name in declared} == {
        name: numbers(floor) for name, floor in declared.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel. It is built from a copy, so that nothing from an earlier build gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "data", "out", "tests", "docs"
    )
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "source"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel, which takes all other packages from this environment; and an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (folder / "empty").mkdir()
    return SimpleNamespace(site=site, scripts=python.parent, folder=folder / "empty")


def run(installed, command, *arguments):
    """What an installed command prints. Nothing of the checkout is on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed.scripts / command, *map(str, arguments)],
        cwd=installed.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_recipe_and_page_and_nothing_else(wheel):
    data = [*ROOT.glob("hub_configs/**/*"), *ROOT.glob("modeling_nanogpt/web/*")]
    paths = [*PACKAGES, *(path for path in data if path.is_file())]
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_trains_the_quickstart_in_an_empty_folder_and_samples_from_it(installed):
    said = run(installed, "nanogpt-train", "--max_iters=2", "--eval_tokens=256")
    assert "the model is in out/quickstart" in said
    assert sorted(path.name for path in installed.folder.iterdir()) == ["data", "out"]
    prompt = "def main("
    assert prompt in run(installed, "nanogpt-sample", "out/quickstart", "--prompt", prompt, "--max_new_tokens=4")
    said = run(installed, "nanogpt-convert", "out/quickstart", "out/gpt2", "--to=gpt2")
    assert "out/gpt2" in said and (installed.folder / "out" / "gpt2" / "config.json").exists()


def test_the_wheel_prepares_a_text_and_knows_a_recipe_by_the_name_that_it_has_in_a_checkout(installed):
    (installed.folder / "notes.txt").write_text("to be or not to be\n" * 400, encoding="utf-8")
    flags = ["--corpus=notes.txt", "--data_dir=data/notes"]
    assert "data/notes" in run(installed, "nanogpt-prepare", *flags)
    run(installed, "nanogpt-train", "hub_configs/shakespeare_char_cpu.yaml", *flags, "--prepare_only=true")
    assert not (installed.folder / "out" / "shakespeare_char_cpu").exists()
