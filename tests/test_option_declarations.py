"""Every option is declared once, described, read by somebody, and repeated by no other class."""

import ast
import dataclasses
import pathlib
import re
import runpy
import typing
from collections.abc import Iterator
from typing import Literal, get_origin

import pytest

from alphagrpo_jax import config as config_lib
from alphagrpo_jax.config import Config
from alphagrpo_jax.config_checks import read_config

PACKAGE = pathlib.Path(config_lib.__file__).parent
DECLARATIONS = "alphagrpo_jax.config"
RELAY = 3  # options of one section, repeated with plain types
CHOICES = [name for name, kind in vars(config_lib).items() if get_origin(kind) is Literal]
PLAIN = re.compile(rf"(int|float|bool|str|None|tuple|Literal|{'|'.join(CHOICES)}|'\w*'|\W)*")


def options(section: type = Config, prefix: str = "") -> Iterator[tuple[type, str, str]]:
    """The section, the name and the whole key of every option."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield section, field.name, f"{prefix}{field.name}"


def path_of(module: str) -> pathlib.Path | None:
    """The file of a module of the package; None for names in modules and other packages."""
    stem = PACKAGE.parent.joinpath(*module.split("."))
    files = [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()]
    return files[0] if files and module.startswith("alphagrpo_jax") else None


def reached(module: str, trees: dict[str, ast.Module]) -> dict[str, ast.Module]:
    """The syntax trees of a module and of everything in the package that it imports."""
    path = path_of(module)
    if path is None or module in trees:
        return trees
    trees[module] = ast.parse(path.read_text())
    for node in ast.walk(trees[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            reached(name, trees)
    return trees


@pytest.fixture(scope="module")
def trainer() -> dict[str, ast.Module]:
    """What `alphagrpo_jax.train` consists of, without the declarations themselves."""
    modules = reached("alphagrpo_jax.train", {})
    return {name: tree for name, tree in modules.items() if name != DECLARATIONS}


def test_no_class_of_the_trainer_repeats_options(trainer):
    """Two names may be chance (height and width); three of one section are a relay."""
    assert {"alphagrpo_jax.loss", "alphagrpo_jax.rewards.workers.pool"} <= trainer.keys()
    sections: dict[type, set[str]] = {}
    for section, name, _ in options():
        sections.setdefault(section, set()).add(name)
    for module, tree in trainer.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            fields = {
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and PLAIN.fullmatch(ast.unparse(field.annotation))
            }
            for section, names in sections.items():
                common = sorted(fields & names)
                where = f"{module}.{node.name} repeats {common} of config.{section.__name__}"
                assert len(common) < RELAY, f"{where}: take the section itself"


def test_names_of_sections_mean_nothing_else():
    names = {cls.__name__ for cls in vars(config_lib).values() if dataclasses.is_dataclass(cls)}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        again = names & {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        assert not again or path == path_of(DECLARATIONS), f"{path} has {sorted(again)} once more"


def test_every_option_is_read(trainer):
    trees = [*trainer.values(), *reached("alphagrpo_jax.bench", {}).values()]
    read = {n.attr for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    unread = [key for _, name, key in options() if name not in read]
    assert not unread, f"options that nothing reads: {unread}"


@pytest.mark.parametrize(
    ("section", "name"), [option[:2] for option in options()], ids=[key for *_, key in options()]
)
def test_every_option_is_described_and_has_no_default(section, name):
    owner = next(cls for cls in section.__mro__ if name in vars(cls).get("__annotations__", {}))
    field = owner.__pydantic_fields__[name]
    assert field.description, f"{owner.__name__}.{name} needs a text below it"
    assert field.description.rstrip().endswith(".")
    assert field.is_required(), "default values stand in configs/grpo.py"


def test_sections_are_static_arguments():
    first, second = read_config(), read_config()
    assert first is not second
    assert {first: "one"}[second] == "one"  # equal, and of one hash
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.seed = 1


def test_adding_an_option_takes_a_field_and_a_default(tmp_path):
    """Nothing but the field says what is allowed."""
    source = pathlib.Path(config_lib.__file__).read_text()
    marker = "    advantage_clip: float = Field(ge=1e-6, le=1e6)\n"
    assert marker in source
    added = '    bonus: int = Field(ge=0, le=3)\n    """Bonus per text, in points."""\n'
    (tmp_path / "changed.py").write_text(source.replace(marker, added + marker))
    section = runpy.run_path(str(tmp_path / "changed.py"))["LossOptions"]
    values = dataclasses.asdict(read_config().loss)
    assert section(**values, bonus=2).bonus == 2
    with pytest.raises(ValueError, match=r"bonus\n  Input should be less than or equal to 3"):
        section(**values, bonus=4)
