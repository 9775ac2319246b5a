"""Recomputes the recorded outputs of the official BAGEL code and compares them.

    python -m alphagrpo_jax.check_port --fixture DIR

DIR is a BAGEL folder with expected.json and expected.npz. Prints one row per case and, last,
`N of M outputs within tolerance`; exits with 1 unless N = M.
"""

import argparse
import dataclasses
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from alphagrpo_jax.parity import gradient_cases, image_cases, sampling_cases, text_cases
from alphagrpo_jax.parity.fixture import compare, load_fixture
from alphagrpo_jax.parity.model import Port
from alphagrpo_jax.parity.text_cases import Outputs
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError

# Pattern of the case's name -> its recomputation; the first that matches wholly.
CASES: dict[str, Callable[[Port, str], Outputs]] = {
    r"c1": lambda port, _: text_cases.tokenizer(port),
    r"c2": lambda port, _: image_cases.encoders(port),
    r"c3": lambda port, _: text_cases.prefill(port),
    r"c4": lambda port, _: text_cases.decoding(port),
    r"c5": lambda port, _: image_cases.drawing(port),
    r"c6": lambda port, _: image_cases.thinking(port),
    r"c7": lambda port, _: image_cases.editing(port),
    r"c8\w*": sampling_cases.generating,
    r"c9": lambda port, _: sampling_cases.stepping(port),
    r"c10": lambda port, _: image_cases.batches(port),
    r"c11": lambda port, _: gradient_cases.gradients(port),
    r"c12": lambda port, _: text_cases.resizing(port),
    r"c13": lambda port, _: sampling_cases.pipeline(port),
    r"c14": lambda port, _: gradient_cases.training(port),
}


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """Comparison of the outputs of one case."""

    case: str
    errors: dict[str, float]  # largest absolute error, by array
    failed: tuple[str, ...]  # arrays outside the tolerance or not recomputed
    message: str = ""  # why the recomputation stopped, if it did

    @property
    def passed(self) -> int:
        """The number of arrays within tolerance."""
        return len(self.errors) - len(self.failed)


def check(
    fixture: str | Path,
    cases: Sequence[str] | None = None,
    report: Callable[[CaseResult], None] = lambda result: None,
    only: str = ".*",
) -> list[CaseResult]:
    """Recomputes the outputs of a fixture.

    Args:
      fixture: the folder.
      cases: names of cases to run (`["c3", "c8edit"]`); None: all of them.
      report: called with every result as soon as it is there.
      only: regular expression of the arrays to recompute.
    Returns:
      One result per case.
    Raises:
      MissingFileError, FixtureError, InputError: the folder cannot be loaded, or has no such case.
    """
    recorded = load_fixture(fixture).restricted(only)
    outputs = recorded.outputs()
    unknown = sorted(set(cases or ()) - outputs.keys())
    if unknown:
        raise InputError(f"{fixture} has no cases {unknown}; it has {sorted(outputs)}")
    results = []
    with jax.default_matmul_precision("highest"):
        port = Port(recorded)
        for case, names in outputs.items():
            if cases is None or case in cases:
                results.append(_check_case(port, case, names))
                report(results[-1])
    return results


def _check_case(port: Port, case: str, names: list[str]) -> CaseResult:
    function = next((f for pattern, f in CASES.items() if re.fullmatch(pattern, case)), None)
    got, message = {}, f"no recomputation is known for case {case}" if function is None else ""
    if function is not None:
        try:
            got = function(port, case)
        except Exception as error:  # the other cases still count
            traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            message = f"{type(error).__name__}: {error} ({where})"
    verdicts = {name: compare(got.get(name), port.array(name)) for name in names}
    errors = {name: error for name, (_, error) in verdicts.items()}
    failed = tuple(name for name, (within, _) in verdicts.items() if not within)
    return CaseResult(case, errors, failed, message)


def _print_row(result: CaseResult) -> None:
    worst = max(result.errors.values(), default=0.0)
    verdict = "pass" if not result.failed else "FAIL"
    count = f"{result.passed}/{len(result.errors)}"
    print(f"{result.case:<10} {count:>9} {worst:>15.3e}  {verdict}", flush=True)
    if result.message:
        print(f"    {result.message}")
    for name in result.failed[:8]:
        print(f"    {name}: max abs error {result.errors[name]:.3e}")
    if len(result.failed) > 8:
        print(f"    ... and {len(result.failed) - 8} more")


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m alphagrpo_jax.check_port", description=__doc__)
    parser.add_argument("--fixture", required=True, help="folder with recorded outputs")
    parser.add_argument("--cases", nargs="*", help="only these cases, e.g. c3 c8edit")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Checks a fixture and prints a table; returns the exit code."""
    print(f"{'case':<10} {'arrays':>9} {'max abs error':>15}  verdict", flush=True)
    results = check(options.fixture, options.cases, _print_row)
    total = sum(len(result.errors) for result in results)
    passed = sum(result.passed for result in results)
    print(f"{passed} of {total} outputs within tolerance")
    return cli.DONE if passed == total else cli.FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
