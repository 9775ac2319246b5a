"""setup.py, constraints.txt, the launch scripts and the README agree with the repository."""

import ast
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from alphagrpo_jax import config as config_lib
from alphagrpo_jax.rewards.questions import parse_record
from configs import grpo

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "alphagrpo_jax"
README = (ROOT / "README.md").read_text()
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
    wanted = setup_arguments["install_requires"] + setup_arguments["extras_require"]["tests"]
    for requirement in map(Requirement, wanted):
        version = versions[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is pinned"
        assert len(requirement.specifier) > 0, f"{requirement} has no range"


def test_every_imported_package_is_declared(setup_arguments):
    declared = {canonical(Requirement(r).name) for r in setup_arguments["install_requires"]}
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
                distributions = {canonical(name) for name in provided_by[root]}
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


def test_readme_commands_exist():
    commands = re.findall(r"python -m (alphagrpo_jax[\w.]*)", README)
    assert commands
    for name in set(commands):
        path = ROOT / (name.replace(".", "/") + ".py")
        assert path.exists(), f"README names python -m {name}"
        assert '__name__ == "__main__"' in path.read_text(), f"{name} is no command"
    for script in set(re.findall(r"\./(launch/\w+\.sh)", README)):
        assert os.access(ROOT / script, os.X_OK), f"README names {script}"
    for config in set(re.findall(r"configs/\w+\.py", README)):
        assert (ROOT / config).exists(), f"README names {config}"


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)#\s]+)", README)
    for link in links:
        if not link.startswith(("http://", "https://")):
            assert (ROOT / link).exists(), f"README links to {link}"


def test_readme_functions_exist():
    rows = re.findall(r"`(alphagrpo_jax(?:\.\w+)+)`", README)
    assert rows
    for dotted in set(rows):
        if importlib.util.find_spec(dotted.rpartition(".")[0]) is None:
            raise AssertionError(f"README names {dotted}: no such module")
        module = importlib.import_module(dotted.rpartition(".")[0])
        is_module = hasattr(module, "__path__") and importlib.util.find_spec(dotted) is not None
        assert is_module or hasattr(module, dotted.rpartition(".")[2]), f"README names {dotted}"


def test_readme_record_is_one():
    line = re.search(r"```json\n(.+)\n```", README)[1]
    record = parse_record(json.loads(line))
    assert (len(record.asked_semantic), len(record.asked_quality)) == (1, 1)


def test_readme_fields_exist():
    table = README[README.index("| field | meaning |") :]
    fields = re.findall(r"`([a-z]+(?:\.[a-z_]+)?)`", table[: table.index("\n\n")])
    config = config_lib.from_config_dict(grpo.get_config())
    for field in fields:
        value = config
        for name in field.split("."):
            value = getattr(value, name)
    assert "mesh.tensor" in fields


def test_ci_runs_the_readme_test_command():
    assert "./launch/test.sh" in README
    assert "./launch/test.sh" in (ROOT / ".ci" / "run").read_text()
