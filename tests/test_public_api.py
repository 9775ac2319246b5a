"""The public interface: complete, lazy, documented, and known to type checkers."""

import ast
import pathlib
import re
import sys

import alphagrpo_jax

ROOT = pathlib.Path(__file__).parent.parent


def test_every_public_name_can_be_imported():
    for name in alphagrpo_jax.__all__:
        assert getattr(alphagrpo_jax, name) is not None
    assert set(alphagrpo_jax.__all__) <= set(dir(alphagrpo_jax))


def test_unknown_names_are_refused():
    assert not hasattr(alphagrpo_jax, "no_such_name")


def test_names_come_from_the_modules_that_type_checkers_see():
    tree = ast.parse((ROOT / "alphagrpo_jax" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    modules = {}
    for node in block.body:
        modules |= {alias.name: node.module for alias in node.names}
    assert sorted(modules) == sorted(alphagrpo_jax.__all__)
    for name, module in alphagrpo_jax._MODULE_OF.items():
        assert modules.pop(name) == f"alphagrpo_jax.{module}"
    assert modules == dict.fromkeys(alphagrpo_jax._PUBLIC_MODULES, "alphagrpo_jax")


def test_importing_the_package_loads_neither_jax_nor_torch(run_python):
    code = "import sys, alphagrpo_jax; print(sorted({'jax', 'numpy', 'torch'} & set(sys.modules)))"
    process = run_python("-c", code)
    assert (process.returncode, process.stdout.strip()) == (0, "[]"), process.stderr


def test_every_public_name_is_documented():
    text = (ROOT / "docs" / "api.md").read_text()
    words = set(re.findall(r"\w+", text))
    assert set(alphagrpo_jax.__all__) <= words
    assert "alphagrpo_jax" in sys.modules
