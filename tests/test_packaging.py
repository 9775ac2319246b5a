"""setup.py, constraints.txt and the launch scripts agree with the repository."""

import ast
import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
import yaml
from packaging.requirements import Requirement

import alphagrpo_jax
from alphagrpo_jax.rewards.verifiers.hf import torchvision_command

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "alphagrpo_jax"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.fixture
def setup_arguments(monkeypatch) -> dict:
    """What setup.py passes to setuptools.setup."""
    received = {}
    stand_in = types.SimpleNamespace(
        setup=lambda **arguments: received.update(arguments),
        find_packages=lambda include: include,
    )
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)
    runpy.run_path(str(ROOT / "setup.py"))
    return received


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_lie_in_the_ranges_of_setup(setup_arguments):
    versions = pinned()
    extras = setup_arguments["extras_require"]
    wanted = [*setup_arguments["install_requires"]]
    for extra in ("tests", "dev", "docs", "judges", "torchvision"):
        wanted += extras[extra]
    for requirement in map(Requirement, wanted):
        version = versions[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is pinned"
        assert len(requirement.specifier) > 0, f"{requirement} has no range"


def test_the_pinned_torchvision_fits_the_pinned_torch():
    versions = pinned()
    command = torchvision_command(versions["torch"])
    assert command.endswith(f"torchvision=={versions['torchvision']}")


def test_every_imported_package_is_declared(setup_arguments):
    extras = setup_arguments["extras_require"]  # whose packages are imported where they are wanted
    requirements = [*setup_arguments["install_requires"], *extras["wandb"]]
    declared = {canonical(Requirement(r).name) for r in requirements}
    provided_by = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                roots = [node.module.split(".")[0]]
            else:
                continue
            for root in set(roots) - set(sys.stdlib_module_names) - {"alphagrpo_jax", "jaxlib"}:
                distributions = {canonical(name) for name in provided_by.get(root, [root])}
                assert distributions & declared, f"{path.name} imports {root}: not in setup.py"


def test_assets_are_package_data(setup_arguments):
    patterns = setup_arguments["package_data"]["alphagrpo_jax"]
    packaged = {path for pattern in patterns for path in recursive_files(pattern)}
    folders = (PACKAGE / "shapes" / "assets", PACKAGE / "rewards" / "templates")
    assets = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert assets == packaged
    for path in assets:
        assert path.stat().st_size <= 10 * 2**20, f"{path.name} is larger than 10 MiB"


def recursive_files(pattern: str) -> list[pathlib.Path]:
    """The files of a setuptools pattern, where a last `**` takes files of all levels."""
    return [path for path in PACKAGE.glob(pattern + "/*") if path.is_file()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_run(script: pathlib.Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name != "setup.sh":  # that one is sourced
        assert os.access(script, os.X_OK), f"{script.name} is not executable"


PYTHON_STAND_IN = """#!/bin/bash
# As `python -m venv FOLDER`, and as the pip in it.
if [ "$2" = venv ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && : > "$3/bin/activate"
else
  echo "${@: -1}" >> installed.log
fi
"""


def test_setup_installs_anew_when_the_extras_change(tmp_path: pathlib.Path):
    for name in ("setup.py", "constraints.txt", "python"):
        (tmp_path / name).write_text(PYTHON_STAND_IN)
    (tmp_path / "python").chmod(0o755)
    for extras in ("", "", ".[tests,cuda]", "", ".[tests,cuda]", ".[tests]"):
        subprocess.run(
            ["bash", "-euc", f'. "{ROOT}/launch/setup.sh"'],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": "./python", "VENV": "venv", "EXTRAS": extras},
            check=True,
        )
    installed = (tmp_path / "installed.log").read_text().splitlines()
    assert installed == [".[tests]", ".[tests,cuda]", ".[tests]"]


def test_ci_runs_the_readme_test_command():
    assert "./launch/test.sh" in (ROOT / "README.md").read_text()
    assert "./launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_ci_builds_the_manual_strictly():
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text()


def test_hosted_ci_runs_the_same_script():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    versions = [step["with"]["python-version"] for step in steps if "with" in step]
    assert versions == ["3.11"]


def test_changelog_has_this_version():
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{alphagrpo_jax.__version__}\] - \d{{4}}-\d\d-\d\d", titles[1])
