"""What may import what, by folder; where torch and HTTP may appear; how long files may be."""

import ast
import functools
import itertools
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "alphagrpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# The floors of the house, the lowest first: a unit imports units of lower floors alone. A unit is a
# top-level module, a folder, or a folder inside one. Every other top-level module is a command.
FLOORS = (
    {"ops", "tasks", "runtime", "score_specs"},
    {"config"},
    {"config_rules", "flow", "losses", "refinement", "models", "rewards/verifiers", "shapes"},
    {"config_checks", "policy", "types", "decomposition", "rewards/workers", "loss"},
    {"prompts", "advantage", "sampling", "parity", "rewards"},
    {"training"},
    {"initial_images", "rollout", "reward", "update", "planning"},
    {"evaluation", "inference"},
    {"commands", "shapes/pretraining"},
    {"studies"},
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

PURE = {"ops", "flow", "loss", "losses", "advantage", "refinement"}
PURE_MAY_IMPORT = {"alphagrpo_jax", "jax", "numpy", "chex", "flax"}
PURE_MAY_IMPORT |= {"collections", "dataclasses", "functools", "math", "typing"}
TORCH_PLACES = ("rewards/verifiers/", "shapes/pretraining/", "studies/", "serve_verifier")
HTTP = {"http", "urllib", "requests", "httpx", "httpx2", "aiohttp"}
HTTP |= {"fastapi", "starlette", "uvicorn"}
HTTP_PLACES = ("rewards/verifiers/", "serve_verifier")
MODEL_PLACES = ("policy.py", "models/")

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
MAX_TRAIN_MAIN_LINES = 120
MAX_GET_CONFIG_LINES = 150  # a flat list of fields


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: pathlib.Path) -> frozenset[str]:
    """Dotted names of all modules and of their names that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def roots(path: pathlib.Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(location: str) -> str:
    """The unit of a file or module: "rewards/workers/pool" -> "rewards/workers"."""
    first, second = [*location.removesuffix(".py").split("/"), ""][:2]
    folder = f"{first}/{second}"
    return folder if folder in FLOOR_OF else first


def floor_of(unit: str) -> int:
    return FLOOR_OF.get(unit, FLOOR_OF["commands"])


def imported_units(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(imported name, its unit) for everything that a file imports from this package."""
    for name in imports(path):
        package, _, module = name.partition(".")
        unit = unit_of(module.replace(".", "/"))
        if package == "alphagrpo_jax" and not unit.startswith("__"):
            yield name, unit


def test_every_unit_has_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert folders <= set(FLOOR_OF)
    for path in PACKAGE.glob("*.py"):
        if path.stem not in {*FLOOR_OF, "__init__"}:
            assert '__name__ == "__main__"' in path.read_text(), f"{path.name} is no command"
    for unit in set(FLOOR_OF) - {"commands"}:
        assert (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").exists(), f"{unit} is gone"


def test_imports_lead_to_lower_floors():
    """So there are no circles of units; files of one unit may import one another."""
    wrong = []
    for path in FILES:
        unit = unit_of(relative(path))
        for name, imported in imported_units(path):
            is_lower = floor_of(imported) < floor_of(unit)
            if unit not in {imported, "__init__"} and not is_lower:
                wrong.append(f"{relative(path)} (floor {floor_of(unit)}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_files_do_not_import_in_circles():
    graph = {}
    for path in FILES:
        module = relative(path).removesuffix(".py").removesuffix("/__init__")
        names = {name.removeprefix("alphagrpo_jax.") for name, _ in imported_units(path)}
        units = {name.replace(".", "/") for name in names}
        graph[module] = {unit for unit in units | {p.rpartition("/")[0] for p in units}}
    while leaves := {module for module, needed in graph.items() if not needed & graph.keys()}:
        graph = {module: needed for module, needed in graph.items() if module not in leaves}
    assert not graph, f"in or above a circle: {sorted(graph)}"


def test_pure_math_imports_array_libraries_alone():
    for path in FILES:
        if unit_of(relative(path)) in PURE:
            assert roots(path) <= PURE_MAY_IMPORT, relative(path)


def test_torch_and_http_stay_in_their_places():
    for modules, places in (({"torch"}, TORCH_PLACES), (HTTP, HTTP_PLACES)):
        for path in FILES:
            if not relative(path).startswith(places):
                assert not roots(path) & modules, f"{relative(path)} imports {modules}"


def test_configs_import_only_ml_collections():
    assert CONFIGS, "no configs"
    for path in CONFIGS:
        assert roots(path) <= {"ml_collections", "configs"}, path.name


def test_only_policy_applies_the_model():
    for path in FILES:
        if not relative(path).startswith(MODEL_PLACES):
            for node in ast.walk(parsed(path)):
                applies = isinstance(node, ast.Attribute) and node.attr == "apply"
                assert not applies, f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"


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


def line_limit(path: pathlib.Path, function: str) -> int:
    if path in CONFIGS:
        return MAX_GET_CONFIG_LINES
    is_train_main = (relative(path), function) == ("train.py", "main")
    return MAX_TRAIN_MAIN_LINES if is_train_main else MAX_FUNCTION_LINES


def test_sizes():
    for path in FILES + CONFIGS:
        count = len(path.read_text().splitlines()) - described_lines(parsed(path))
        assert count <= MAX_FILE_LINES, f"{path} has {count} lines, at most {MAX_FILE_LINES}"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                count, limit = node.end_lineno - node.lineno + 1, line_limit(path, node.name)
                where = f"{path}:{node.name} has {count} lines, at most {limit}"
                assert count <= limit, where
