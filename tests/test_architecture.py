"""Which file may import which, where torch and HTTP may appear, and how long files may be."""

import ast
import itertools
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "alphagrpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# From the bottom to the top: a unit (a top-level file or a folder) imports only units before it.
LIBRARIES = (
    "ops",
    "flow",
    "config_fields",
    "tasks",
    "config",
    "runtime",
    "models",
    "policy",
    "types",
    "optimizers",
    "sampling",
    "shapes",
)
STAGES = ("prompts", "rollout", "rewards", "advantage", "refinement", "loss", "update")
JOINTS = (
    "evaluation",
    "build",
    "judges",
    "jitted",
    "guards",
    "trainer",
    "learner",
    "heldout",
    "run_folder",
    "trained",
    "inference",
)  # stages put together, for the commands
ORDER = {unit: level for level, unit in enumerate((*LIBRARIES, *STAGES, *JOINTS))}
# Stages meet in the commands through types.py; these are the exceptions.
BETWEEN_STAGES = {
    ("update", "rollout"),  # the contexts that a rollout stored
    ("update", "loss"),
    ("prompts", "rewards"),  # the form of a record
}
# What stands above everything, as the commands do: they import it, nothing else does.
COMMAND_FOLDERS = ("port",)
TRAINING_SCRIPTS = (
    "shapes/batches",
    "shapes/measure",
    "shapes/muon",
    "shapes/pretrain",
    "shapes/refine_study",
    "shapes/reward_figures",
    "shapes/study",
    "shapes/tokenizer_build",
    "shapes/train_",
    "shapes/verifier_",
)

PURE = ("ops", "flow", "loss", "advantage")
PURE_MAY_IMPORT = {"jax", "numpy", "chex", "flax"}
TORCH_PLACES = ("rewards/verifiers/", "serve_verifier", *TRAINING_SCRIPTS)
HTTP_PLACES = ("rewards/verifiers/", "serve_verifier")
HTTP = {
    "http",
    "urllib",
    "requests",
    "httpx",
    "httpx2",
    "aiohttp",
    "fastapi",
    "starlette",
    "uvicorn",
}

NOT_MODELS = ("update", "steps")  # their `apply` is the optimizer's

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
MAX_TRAIN_MAIN_LINES = 120
MAX_GET_CONFIG_LINES = 150  # a flat list of fields


def imports(path: pathlib.Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module
            if node.module == "alphagrpo_jax":
                yield from (f"alphagrpo_jax.{alias.name}" for alias in node.names)


def own_units(path: pathlib.Path) -> set[str]:
    """The units of this package that a file imports: `ops`, `policy`, ..."""
    names = (name.split(".") for name in imports(path))
    units = {parts[1] for parts in names if parts[0] == "alphagrpo_jax" and len(parts) > 1}
    return units - {"__version__"}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_command(path: pathlib.Path) -> bool:
    return unit_of(path) not in ORDER or relative(path).startswith(TRAINING_SCRIPTS)


def test_every_unit_is_known():
    for path in PACKAGE.glob("*.py"):
        if is_command(path) and path.stem != "__init__":
            is_run = '__name__ == "__main__"' in path.read_text()
            assert is_run, f"{relative(path)}: neither a stage nor a library nor a command"
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    extra = folders - set(ORDER) - set(COMMAND_FOLDERS)
    assert not extra, f"folders without a level: {sorted(extra)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_only_what_is_below(path: pathlib.Path):
    unit = unit_of(path)
    if is_command(path):
        return  # it imports whatever it needs
    for name in imports(path):
        below = name.removeprefix("alphagrpo_jax.").replace(".", "/")
        assert not below.startswith(TRAINING_SCRIPTS), f"{relative(path)} imports {name}"
    for target in own_units(path) - {unit}:
        where = f"{relative(path)} imports {target}"
        assert target in ORDER, f"{where}, a command"
        if unit in STAGES and target in STAGES:
            assert (unit, target) in BETWEEN_STAGES, f"{where}: stages meet in the commands only"
        else:
            assert ORDER[target] < ORDER[unit], f"{where}, which lies above it"


def test_pure_math_imports_only_array_libraries():
    standard = {"dataclasses", "math", "functools", "typing", "collections"}
    for path in FILES:
        if unit_of(path) in PURE:
            foreign = {name.split(".")[0] for name in imports(path)}
            extra = foreign - PURE_MAY_IMPORT - standard - {"alphagrpo_jax"}
            assert not extra, f"{relative(path)} imports {sorted(extra)}"


@pytest.mark.parametrize(
    ("modules", "places"), [({"torch"}, TORCH_PLACES), (HTTP, HTTP_PLACES)], ids=["torch", "http"]
)
def test_torch_and_http_stay_in_their_places(modules: set[str], places: tuple[str, ...]):
    for path in FILES:
        found = {name.split(".")[0] for name in imports(path)} & modules
        if found:
            assert relative(path).startswith(places), f"{relative(path)} imports {sorted(found)}"


def test_configs_import_only_ml_collections():
    assert CONFIGS, "no configs found"
    for path in CONFIGS:
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= {"ml_collections", "configs"}, f"{path.name} imports {sorted(roots)}"


def test_only_policy_applies_the_model():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "apply":
                owner = ast.unparse(node.value)
                where = f"{relative(path)}:{node.lineno} uses {owner}.apply"
                # layers.py runs one layer of a stack, inside the model.
                callers = ("policy.py", "models/layers.py", *TRAINING_SCRIPTS)
                allowed = relative(path).startswith(callers)
                assert allowed or owner.split(".")[-1] in NOT_MODELS, where


def test_keys_are_typed():
    for path in FILES:
        assert "PRNGKey" not in path.read_text(), f"{relative(path)}: use jax.random.key"


def described_lines(tree: ast.Module) -> int:
    """Lines of the texts below fields, which become the manual's page of options."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return sum(
        text.end_lineno - text.lineno + 1
        for node in classes
        for field, text in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    )


@pytest.mark.parametrize("path", FILES + CONFIGS, ids=lambda path: path.name)
def test_sizes(path: pathlib.Path):
    text = path.read_text()
    count = len(text.splitlines()) - described_lines(ast.parse(text))
    assert count <= MAX_FILE_LINES, f"{path.name} has {count} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            limit = MAX_FUNCTION_LINES
            if path.name == "train.py" and node.name == "main":
                limit = MAX_TRAIN_MAIN_LINES
            elif path in CONFIGS:
                limit = MAX_GET_CONFIG_LINES
            assert lines <= limit, f"{path.name}:{node.name} has {lines} lines, at most {limit}"
