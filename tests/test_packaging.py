"""setup.py, constraints.txt, the launch scripts and the README agree with the repository."""

import argparse
import ast
import importlib
import importlib.metadata
import json
import operator
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.runtime.records import parse_record
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
    extras = setup_arguments["extras_require"]
    wanted = setup_arguments["install_requires"] + extras["tests"] + extras["dev"]
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


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """The modules and arguments of all `python -m alphagrpo_jax.NAME ...` in a Markdown text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for line in (*lines, *spans):
        for command in re.split(r"(?=python -m )| -- | \| ", line):
            match = re.match(r"python -m (alphagrpo_jax[\w.]*)(.*)", command, re.DOTALL)
            if match:
                words = shlex.split(re.sub(r"[\[\]]", " ", match[2]), comments=True)
                found.append((match[1], words))
    return found


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a command, which is asked to parse and does no more than that."""

    class AskedError(Exception):
        pass

    def stop(parser, *_, **__):
        raise AskedError(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module = importlib.import_module(name)
        with pytest.raises(AskedError) as asked:
            module.main()
    return asked.value.args[0]


CARDS = sorted((PACKAGE / "shapes" / "assets").glob("*/README.md"))


@pytest.mark.parametrize("path", [ROOT / "README.md", *CARDS], ids=lambda path: path.parent.name)
def test_commands_have_the_flags_that_they_are_shown_with(path: pathlib.Path, monkeypatch):
    commands = commands_in(path.read_text())
    assert commands
    config = grpo.get_config()
    for name, words in commands:
        shown = " ".join((name, *words))
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        if name == "alphagrpo_jax.train":
            for flag in given - {"--config", "--workdir", "--config.FIELD"}:
                field = operator.attrgetter(flag.removeprefix("--config."))
                assert field(config) is not None, f"{shown}: no {flag}"
            continue
        parser = parser_of(name, monkeypatch)
        known = {option for action in parser._actions for option in action.option_strings}
        assert given <= known, f"{shown}: no flags {sorted(given - known)}"
        required = [set(a.option_strings) for a in parser._actions if a.required]
        missing = [sorted(options) for options in required if options and not options & given]
        assert "--help" in given or not missing, f"{shown}: lacks {missing}"


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
