"""The arrows between the rooms: who imports whom, what travels alone, and that importing does nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from support import PATIENCE, ROOT

ROOMS = ("modeling_nanogpt", "tokenization", "train_accelerate")
ENTRY = "command_start"  # what the commands of all rooms begin with
FILES = [
    ROOT / "train_accelerate.py",
    ROOT / f"{ENTRY}.py",
    *sorted(ROOT.glob("modeling_nanogpt/**/*.py")),
    *sorted(ROOT.glob("tokenization/**/*.py")),
]
TRAVELLERS = ("configuration_nanogpt.py", "modeling_nanogpt.py")


def name_of(path):
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [name_of(path) for path in FILES]


def imports_of(path):
    """Every import statement of a file, wherever it stands, as (dots before the name, the name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # `from . import x` names its module after the import
            yield from ((node.level, node.module or alias.name) for alias in node.names)


def rooms_used(path):
    """The rooms of the project that a file imports from."""
    roots = {name.split(".")[0] for name in modules_used(path)}
    return roots & {*ROOMS, "hub_configs", "tests", "support", "outside"}


def modules_used(path):
    """The modules that a file imports from, under their whole names. A relative import may lead "outside" of ROOT."""
    package = path.relative_to(ROOT).parts[:-1]
    for dots, name in imports_of(path):
        if dots > len(package):
            yield "outside"
        elif dots:
            yield ".".join((*package[: len(package) - dots + 1], name))
        else:
            yield name


# ---------------------------------------------------------------------------------------------------------------------
# Arrows


@pytest.mark.parametrize("room", ["modeling_nanogpt", "tokenization"])
def test_a_room_imports_nothing_of_the_project_but_itself(room):
    paths = sorted((ROOT / room).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        assert rooms_used(path) <= {room}, path


def test_the_model_knows_nothing_of_training_runs():
    # training/ stands on the files of the model, and not the other way round
    training = sorted((ROOT / "modeling_nanogpt" / "training").rglob("*.py"))
    assert len(training) > 8 and any("modeling_nanogpt.sources" in modules_used(path) for path in training)
    others = [path for path in FILES if "modeling_nanogpt" in path.parts and path not in training]
    assert len(others) > 8
    for path in others:
        used = [module for module in modules_used(path) if "training" in module.split(".")]
        assert used == [], path


def test_the_trainer_stands_on_both_rooms():
    assert rooms_used(ROOT / "train_accelerate.py") == {"modeling_nanogpt", "tokenization"}


def test_what_commands_begin_with_stands_alone_and_only_commands_use_it():
    assert {name.split(".")[0] for name in modules_used(ROOT / f"{ENTRY}.py")} <= set(sys.stdlib_module_names)
    users = {name_of(path) for path in FILES if ENTRY in modules_used(path)}
    commands = {name_of(path) for path in FILES if "\nif __name__ ==" in path.read_text(encoding="utf-8")}
    commands.remove("modeling_nanogpt.bare_loop")  # `bench` starts it, and reads what it says
    assert users == commands and len(commands) == 9


def test_no_import_hides_from_these_tests():
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {"__import__", "import_module", "exec", "eval"} & names, path
        assert not {"import_module", "spec_from_file_location"} & attributes, path


def test_no_test_file_imports_another():
    tests = ROOT / "tests"
    files = [*tests.glob("*.py"), *tests.glob("support/*.py")]
    assert {"conftest.py", "test_architecture.py", "runs.py"} <= {path.name for path in files}
    alone = {path.stem for path in tests.glob("*.py")} | {"tests"}  # for `from tests import test_x`
    for path in files:
        assert not {part for _, name in imports_of(path) for part in name.split(".")} & alone, path


@pytest.mark.parametrize("name", TRAVELLERS)
def test_a_file_that_travels_needs_only_what_every_model_needs(name):
    # transformers copies the relative imports of a file, one folder deep, and expects everything else to be installed
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    imports = set(imports_of(ROOT / "modeling_nanogpt" / name))
    assert {name.split(".")[0] for dots, name in imports if dots == 0} <= allowed
    assert {(dots, name) for dots, name in imports if dots} <= {(1, "configuration_nanogpt")}


def test_the_network_imports_its_shape_relatively():
    assert (1, "configuration_nanogpt") in set(imports_of(ROOT / "modeling_nanogpt" / "modeling_nanogpt.py"))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_no_file_has_the_name_of_a_library_or_a_name_that_says_nothing():
    # beside a script or a checkpoint, such a file would be imported in place of the library
    ours = {name for name in packages_distributions() if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}
    taken = (set(packages_distributions()) | set(sys.stdlib_module_names)) - ours
    taken |= {"utils", "util", "common", "helpers", "misc", "tiktoken", "evaluate", "datasets", "tokenizers"}
    names = {name for module in MODULES for name in module.split(".")}
    assert names & taken <= {"evaluate"}  # a command, which is only ever started as a module of its package
    assert "evaluate" not in MODULES


def test_recipes_are_not_code():
    paths = [path for path in (ROOT / "hub_configs").rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".yaml", ".md"}
    assert not any(path.stat().st_mode & 0o111 for path in paths)


def tree_of_the_chapter():
    """The modules in the tree of docs/code.md, as paths. A line belongs to the folders above it with less indent."""
    chapter = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```\n(train_accelerate\.py .*?)```", chapter, re.S)
    folders = {}  # indent -> name
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = {depth: name for depth, name in folders.items() if depth < indent}
        if folder := re.match(r" *(\w+/)", line):
            folders[indent] = folder.group(1)
        names = re.match(r" *((?:\w+\.py\s+)*)", line).group(1)
        yield from ("".join(folders.values()) + name for name in names.split())


def test_the_chapters_tree_lists_the_modules_that_are_there():
    there = {str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py"}
    listed = list(tree_of_the_chapter())
    assert sorted(listed) == sorted(there)


# ---------------------------------------------------------------------------------------------------------------------
# Importing has no effects

# What a module could change without being asked. Run in an empty folder; writes what it saw as JSON.
WATCH = """
import importlib, json, locale, logging, os, random, signal, sys, warnings

touched = []


def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        touched.append(f"{event} {args[1:]}")
    if event in ("subprocess.Popen", "os.system", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        touched.append(f"{event} {args[0]}")
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not args[0].startswith("/dev/"):
            touched.append(f"open {args[0]}")


def state():
    import numpy, torch, transformers

    loggers = {name: logging.getLogger(name) for name in ("accelerate", "datasets", "huggingface_hub", "transformers")}
    return {
        "cuda": torch.cuda.is_initialized(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "seeds": [torch.get_rng_state().sum().item(), int(numpy.random.get_state()[1].sum()), hash(random.getstate())],
        "root logger": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "levels": {name: [logger.level, len(logger.handlers)] for name, logger in loggers.items()},
        "progress bars": transformers.utils.logging.is_progress_bar_enabled(),
        "warnings": len(warnings.filters),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
    }
"""

# One process imports the libraries. Each module is then imported by a child, which has nothing of the project yet.
ONE_BY_ONE = (
    WATCH
    + """
import accelerate, datasets, matplotlib.figure, numpy, psutil, pyarrow, torch, transformers, yaml
from accelerate.utils import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

warnings.filterwarnings("ignore", message=".*fork")
folder = sys.argv[1]
for module in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    os.mkdir(f"{folder}/{module}")
    os.chdir(f"{folder}/{module}")
    said = os.open(f"{folder}/{module}.said", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        before = state()
        sys.addaudithook(hook)
        importlib.import_module(module)
        sys.stdout.flush()
        after, left = state(), os.listdir()
        changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
        seen = {"touched": touched[:], "changed": changed, "left": left, "modules": sorted(sys.modules)}
        with open(f"{folder}/{module}.json", "w") as file:
            json.dump(seen, file)
    except BaseException as error:
        os.write(said, repr(error).encode())
    os._exit(0)  # at once: taking all libraries down would take a second
"""
)

# A process that has imported nothing before: the effects of the libraries' own imports show here too.
FRESH = (
    WATCH
    + """
sys.addaudithook(hook)
importlib.import_module(sys.argv[1])
network = [event for event in touched if event.startswith("socket")]
print(json.dumps(state() | {"left": os.listdir(), "network": network}))
"""
)
UNTOUCHED = {
    "cuda": False,
    "dtype": "torch.float32",
    "device": "cpu",
    "precision": "highest",
    "gradients": True,
    "deterministic": [False, False],
    "root logger": [30, 0, 0],  # warnings, no handler, nothing disabled
    "progress bars": True,
    "left": [],
    "network": [],
}


def python(script, *arguments, folder):
    """Run a script in a folder, without writing bytecode. Returns the finished process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    """The folder that holds what each module printed and did when it was imported."""
    folder = tmp_path_factory.mktemp("imports")
    assert python(ONE_BY_ONE, folder, *MODULES, folder=folder).stdout == ""
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_alone_and_changes_nothing(imports, module):
    assert (imports / f"{module}.said").read_text() == ""
    seen = json.loads((imports / f"{module}.json").read_text())
    assert seen["changed"] == {}
    assert seen["touched"] == []
    assert seen["left"] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_loads_no_room_that_it_may_not_import(imports, module):
    seen = json.loads((imports / f"{module}.json").read_text())
    room = module.split(".")[0]
    allowed = set(ROOMS) if room == "train_accelerate" else {room}
    assert {room} - {ENTRY} <= {name.split(".")[0] for name in seen["modules"]} & set(ROOMS) <= allowed


@pytest.mark.parametrize("module", ["modeling_nanogpt", "tokenization.prepare", "train_accelerate"])
def test_a_fresh_process_imports_it_in_silence(module, tmp_path):
    (line,) = python(FRESH, module, folder=tmp_path).stdout.splitlines()  # the script's own
    seen = json.loads(line)
    assert {key: seen[key] for key in UNTOUCHED} == UNTOUCHED
