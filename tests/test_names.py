"""Names say what they hold, docstrings what happens: vague words, double names, spelling."""

import ast
import collections
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "alphagrpo_jax"
FILES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Words that fit any value. A name says the noun instead: row, batch, prompt, task_metrics.
VAGUE = re.compile(
    "_*(alone|asked|bare|both|done|drawn|each|every|found|given|held|kept|known|left|made|mine|moved"
    "|named|one|opened|others?|own|owes|parts?|place|rest|same|seen|settled|several|shown|taken"
    "|things?|together|told|untold|usable|whole)_*"
)
MAX_VAGUE_SHARE = 0.005
# A docstring of a function begins with a verb; that of a class may be a noun.
NO_BEGINNING = re.compile("(How|Of|That|What|When|Where|Whether|Which|Who|Whose)[,:]?")
BRITISH = re.compile(
    "artefact|behaviour|catalogue|centre|colour|favour|judgement|labelled|licence|neighbour"
    "|(author|character|finali|general|initial|maxim|memo|minim|normal|optim|organ|parallel|quant"
    "|random|recogn|regular|serial|special|summar|token|util|visual)i?is(e|ed|es|er|ing|ation)s?"
    "(?![a-z])"
)


def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def bound_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names that a module binds, and their lines: variables, parameters, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


def where(path: pathlib.Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


# Counted separately: the many names of the tests would hide vague ones of the package.
@pytest.mark.parametrize("files", [FILES, TESTS], ids=["package", "tests"])
def test_bound_names_are_nouns_and_verbs_rather_than_vague_words(files):
    count, vague = 0, []
    for path in files:
        for name, line in bound_names(parsed(path)):
            count += 1
            if VAGUE.fullmatch(name):
                vague.append(f"{where(path, line)} {name}")
    share = len(vague) / count
    listed = "\n".join(vague)
    assert share <= MAX_VAGUE_SHARE, f"{len(vague)} of {count} names, {share:.1%}:\n{listed}"


def test_a_public_class_name_has_one_meaning():
    places = collections.defaultdict(list)
    for path in FILES:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(where(path, node.lineno))
    double = {name: lines for name, lines in places.items() if len(lines) > 1}
    assert not double


def test_docstrings_say_what_happens():
    wrong = []
    for path in FILES:
        tree = parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split()
                if words and NO_BEGINNING.fullmatch(words[0]):
                    line = getattr(node, "lineno", 1)
                    wrong.append(f"{where(path, line)} {' '.join(words[:6])}")
    assert not wrong, f"{len(wrong)} docstrings:\n" + "\n".join(wrong)


def test_names_are_spelt_as_in_american_english():
    wrong = []
    for path in FILES:
        for name, line in bound_names(parsed(path)):
            if BRITISH.search(name.lower()):
                wrong.append(f"{where(path, line)} {name}")
    assert not wrong, f"{len(wrong)} names:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "is_british"),
    [("colours", True), ("normalise", True), ("normaliser", True), ("tokenised", True),
     ("raise", False), ("noise", False), ("wise", False), ("initializer", False), ("color", False),
     ("precision", False), ("optimism", False)],
)  # fmt: skip
def test_the_spelling_pattern(name, is_british):
    assert bool(BRITISH.search(name)) == is_british
