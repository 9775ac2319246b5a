"""README, manual, CONTRIBUTING and cards agree with the code: commands, names, fields, links."""

import argparse
import ast
import importlib
import importlib.util
import json
import operator
import os
import pathlib
import re
import shlex
import types
from collections.abc import Iterator

import pytest
from test_architecture import FLOORS

from alphagrpo_jax import tasks
from alphagrpo_jax.runtime.metric_reductions import REDUCTIONS
from alphagrpo_jax.runtime.records import parse_record
from configs import grpo

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
CARDS = sorted((ROOT / "alphagrpo_jax" / "shapes" / "assets").glob("*/README.md"))
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *MANUAL, *CARDS]
WITH_COMMANDS = {README, *CARDS, *(ROOT / "docs" / f"{n}.md" for n in ("commands", "tutorial"))}
MAX_README_LINES = 150
MODULE = r"(?:alphagrpo_jax|benchmarks)[\w.]*"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def hooks() -> types.ModuleType:
    """docs/hooks.py, which mkdocs runs."""
    spec = importlib.util.spec_from_file_location("manual_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language in a Markdown text."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def spans(text: str) -> list[str]:
    """The code spans of a Markdown text."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """The modules and arguments of all `python -m NAME ...` of this project in a Markdown text."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    commands = []
    for line in (*lines, *spans(text)):
        for command in re.split(r"(?=python -m )| -- | \| ", line):
            match = re.match(
                r"python -m ((?:alphagrpo_jax|benchmarks)[\w.]*)(.*)", command, re.DOTALL
            )
            if match:
                words = shlex.split(re.sub(r"[\[\]]", " ", match[2]), comments=True)
                commands.append((match[1], words))
    return commands


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a command, which is asked to parse and does no more than that."""

    class AskedError(Exception):
        pass

    def stop(parser, *_, **__):
        raise AskedError(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module = importlib.import_module(name)
        with pytest.raises(AskedError) as raised:
            module.main()
    return raised.value.args[0]


@every_page
def test_commands_exist(page: pathlib.Path):
    text = page.read_text()
    names = {name for name, _ in commands_in(text)}
    assert names or page not in WITH_COMMANDS
    for name in names:
        path = ROOT / (name.replace(".", "/") + ".py")
        assert path.exists(), f"{page.name} names python -m {name}"
        assert '__name__ == "__main__"' in path.read_text(), f"{name} is no command"
    for script in set(re.findall(r"(launch/\w+\.sh)", text)):
        assert os.access(ROOT / script, os.X_OK), f"{page.name} names {script}"
    for file in set(re.findall(r"(?:configs|examples)/\w+\.py", text)):
        assert (ROOT / file).exists(), f"{page.name} names {file}"


@every_page
def test_commands_have_the_flags_that_they_are_shown_with(page: pathlib.Path, monkeypatch):
    config = grpo.get_config()
    for name, words in commands_in(page.read_text()):
        command = " ".join((name, *words))
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        if name in ("alphagrpo_jax.train", "alphagrpo_jax.plan"):
            fields = {flag for flag in flags if flag.startswith("--config.")}
            for flag in fields - {"--config.FIELD"}:
                field = operator.attrgetter(flag.removeprefix("--config."))
                assert field(config) is not None, f"{command}: no {flag}"
            flags -= fields
            if name == "alphagrpo_jax.train":
                assert flags <= {"--config", "--workdir", "--profile"}, command
                continue
        parser = parser_of(name, monkeypatch)
        declared = {option for action in parser._actions for option in action.option_strings}
        assert flags <= declared, f"{command}: no flags {sorted(flags - declared)}"
        required = [set(a.option_strings) for a in parser._actions if a.required]
        missing = [sorted(options) for options in required if options and not options & flags]
        assert "--help" in flags or not missing, f"{command}: lacks {missing}"


@every_page
def test_config_flags_name_fields(page: pathlib.Path):
    config = grpo.get_config()
    for key in re.findall(r"--config\.([a-z][\w.]*\w)", page.read_text()):
        assert operator.attrgetter(key)(config) is not None, f"{page.name}: no field {key}"


@every_page
def test_fields_exist(page: pathlib.Path):
    config = grpo.get_config()
    sections = {name for name, value in config.items() if hasattr(value, "items")}
    for span in spans(page.read_text()):
        match = re.fullmatch(r"([a-z]+)\.([a-z_.]+[a-z_])(?:=.*)?", span)
        if match and match[1] in sections and match[2] != "py":
            field = operator.attrgetter(f"{match[1]}.{match[2]}")
            try:
                field(config)
            except AttributeError:
                module = importlib.import_module(f"alphagrpo_jax.{match[1]}")  # `train.main`
                assert hasattr(module, match[2]), f"{page.name}: no field {span}"


def test_tables_of_fields_are_read():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert {"mesh.tensor", "data.edit_train", "srr.choice"} <= set(spans(text))


@every_page
def test_links_exist(page: pathlib.Path):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@every_page
def test_functions_exist(page: pathlib.Path):
    for dotted in set(re.findall(r"`(alphagrpo_jax(?:\.\w+)+)`", page.read_text())):
        parent, _, name = dotted.rpartition(".")
        assert importlib.util.find_spec(parent), f"{page.name} names {dotted}: no such module"
        module = importlib.import_module(parent)
        is_module = hasattr(module, "__path__") and importlib.util.find_spec(dotted) is not None
        assert is_module or hasattr(module, name), f"{page.name} names {dotted}"


def test_every_equation_has_a_function():
    table = (ROOT / "docs" / "equations.md").read_text()
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"`alphagrpo_jax(\.\w+)+` \|$|`alphagrpo_jax(\.\w+)+`, ", row), row


@every_page
def test_records_are_records(page: pathlib.Path):
    for line in "".join(blocks(page.read_text(), "json")).splitlines():
        fields = json.loads(line)
        record = parse_record(fields, form="answer" if "answer" in fields else "questions")
        assert record.answers or (len(record.asked_semantic), len(record.asked_quality)) == (1, 1)


def test_readme_shows_a_record():
    assert blocks(README.read_text(), "json")


def python_blocks() -> Iterator[tuple[pathlib.Path, str]]:
    """All Python code of the pages."""
    for page in PAGES:
        for code in blocks(page.read_text(), "python"):
            yield page, code


def test_python_code_uses_names_that_exist():
    assert list(python_blocks())
    for page, code in python_blocks():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("alphagrpo_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: no {alias.name}"


def test_the_new_task_of_the_manual_is_one():
    entries = [(page, code) for page, code in python_blocks() if "Task(\n" in code]
    assert {page.name for page, _ in entries} == {"tasks.md", "tutorial.md"}
    for _, code in entries:
        task = eval(code, vars(tasks).copy())
        assert task.name == "second_look"
        kinds = [step.kind for step in tasks.plan(task.events).steps]
        assert kinds == ["think", "image", "think", "image"]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "tasks.md"], ids=lambda p: p.name)
def test_tables_of_tasks_are_complete(page: pathlib.Path):
    table = page.read_text().partition("| `--config.task` |")[2].partition("\n\n")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(names) == sorted([*tasks.TASKS, "mixed"])


def test_architecture_names_every_part():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in sorted((ROOT / "alphagrpo_jax").iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            assert f"`{path.stem}`" in text or f"`{path.name}`" in text, path.name
        elif any(path.glob("*.py")):
            assert f"`{path.name}/`" in text, path.name


def test_architecture_has_the_floors_that_are_checked():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    floors = [set(re.sub(r"`|/`|the ", "", units).split(", ")) for _, units in rows]
    assert floors == list(FLOORS)


def test_readme_is_a_page():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_metrics_of_an_update_are_described():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in REDUCTIONS:
        assert re.search(rf"`{re.escape(name)}[A-Z]*`", text), f"docs/metrics.md lacks {name}"


def test_table_of_fields_describes_every_field(hooks):
    rows = {row.key: row for section in hooks.sections() for row in section.rows}
    config = grpo.get_config()
    for key, row in rows.items():
        assert operator.attrgetter(key)(config) == row.default
        assert row.description, f"{key} has no description"

    def keys(fields, prefix: str) -> Iterator[str]:
        for name, value in fields.items():
            is_section = hasattr(value, "items")
            yield from keys(value, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]

    assert set(rows) == set(keys(config, ""))
    text = hooks.fields_markdown()
    assert "| `mesh.tensor` | `1` |" in text


def test_table_of_fields_is_put_into_its_page(hooks):
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert hooks.FIELDS_MARK in text
    assert "| `rollout.guidance.interval` |" in hooks.on_page_markdown(text)


def test_pages_from_elsewhere_exist(hooks):
    for source in hooks.PAGES.values():
        assert (ROOT / source).is_file()
