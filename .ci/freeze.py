"""Write constraints.txt anew: the newest releases that install together with all extras, and what holds others back.

    python3 .ci/freeze.py torch==2.13.0 pillow==12.3.0

pip chooses freely in a new environment; only the packages named on the command line are pinned beforehand.
"""

import json
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# The exact versions that CI runs: pip install -c constraints.txt -e ".[test]" installs these.
# `python3 .ci/freeze.py {pins}` writes this file anew. pip chooses for itself what does not support Python 3.10 there.
# A comment says why a version is not the newest release.
"""


def install(folder: str, pins: list[str]) -> None:
    """A new environment with the project and all its extras."""
    extras = ",".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    venv.create(folder, with_pip=True)
    pip = [f"{folder}/bin/python", "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *pins, f"{ROOT}[{extras}]", "packaging"], check=True)


def describe(folder: str, pins: list[str]) -> str:
    """The text of constraints.txt for what an environment holds."""
    (site,) = Path(folder).glob("lib/python*/site-packages")
    sys.path.append(str(site))
    from packaging.requirements import Requirement  # of that environment: nothing has to be installed in ours
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    installed = {canonicalize_name(each.name): each for each in distributions(path=[str(site)])}
    needs = [(name, Requirement(text)) for name, package in installed.items() for text in package.requires or []]
    extras = defaultdict(lambda: {""})  # of each package, those that another package asks for
    for _, need in needs:
        extras[canonicalize_name(need.name)] |= need.extras
    needs = [
        (name, need)
        for name, need in needs
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras[name])
    ]
    command = [f"{folder}/bin/python", "-m", "pip", "list", "--outdated", "--format=json"]
    outdated = json.loads(subprocess.check_output(command))
    newest = {canonicalize_name(package["name"]): package["latest_version"] for package in outdated}

    lines = []
    for name, package in sorted(installed.items()):
        if name in ("nanogpt-hf", "pip"):
            continue
        line = f"{name}=={package.version.split('+')[0]}"
        reasons = {
            f"{other} asks for {need.name}{need.specifier}"
            for other, need in needs
            if canonicalize_name(need.name) == name and newest.get(name, package.version) not in need.specifier
        }
        if line in pins:
            reasons = {"pinned by hand"}
        if "3.10.99" not in SpecifierSet(package.metadata["Requires-Python"] or ""):
            line += '; python_version >= "3.11"'
        if name in newest:
            line += f"  # not {newest[name]}: {', '.join(sorted(reasons))}"
        lines.append(line)
    return HEAD.format(pins=" ".join(pins)) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        install(folder, sys.argv[1:])
        text = describe(folder, sys.argv[1:])
    (ROOT / "constraints.txt").write_text(text)
