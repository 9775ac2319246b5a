"""A run whose reward has scorers: its rows, its logs, and samples without a score."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # a run of its own; tests/training/test_scorer_pools.py is quick

ARGUMENTS = (
    "--config.train.steps=2",
    "--config.verifier.audit=scored.jsonl",
    "--config.reward.max_invalid_fraction=0.9",
    "--config.verifier.max_attempts=2",  # a scorer pauses after failures, and many images fail
    "--config.reward.extra_weights=(0.5, 1.5)",
    "--config.reward.extra_scores="
    "('callable:tiny_verifiers:redness?range=0..255', 'callable:tiny_verifiers:sometimes_nothing')",
)


@pytest.fixture(scope="module")
def scored_run(run, world):
    code, errors = run(world / "scored", *ARGUMENTS)
    assert code == 0, errors
    return world / "scored"


def logged(folder, scorer):
    lines = (folder / f"scored.{scorer}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_have_every_score(scored_run, rows):
    names = ("confidence", "callable.redness", "callable.sometimes_nothing")
    for row in rows(scored_run):
        prefix = "" if row["step"] else "eval/"
        confidence, redness, sometimes = (row[f"{prefix}reward/score/{name}"] for name in names)
        assert 0.0 <= confidence <= 1.0
        assert redness == pytest.approx(sometimes)  # means over the same valid samples
        expected = (confidence + 0.5 * redness / 255.0 + 1.5 * sometimes) / 3
        assert row[f"{prefix}reward/mean"] == pytest.approx(expected)


def test_a_sample_without_a_score_is_invalid_and_no_other_is(scored_run, rows):
    """The logs of all pools join by sample; a missing score or NaN never became a number."""
    attempts = logged(scored_run.parent, "callable.sometimes_nothing")
    outcomes = {row["sample"]: row["scores"] for row in attempts}
    failures = [row["failure"] for row in attempts if row["scores"] is None]
    assert any("the scorer gave no score" in failure for failure in failures)
    assert any("got a score of nan, expected a finite number" in failure for failure in failures)
    assert all(np.isfinite(scores).all() for scores in outcomes.values() if scores)
    assert outcomes.keys() == {
        row["sample"] for row in logged(scored_run.parent, "callable.redness")
    }
    # Evaluations give their samples the same names: the first one ends where training begins.
    trained = next(i for i, row in enumerate(attempts) if row["sample"].startswith("(1,"))
    evaluated = {row["sample"]: row["scores"] for row in attempts[:trained]}
    for row in rows(scored_run):
        prefix = "" if row["step"] else "eval/"
        batch = {
            sample: scores
            for sample, scores in (outcomes if row["step"] else evaluated).items()
            if sample.startswith(f"({row['step']}," if row["step"] else "('eval',")
        }
        share = np.mean([scores is not None for scores in batch.values()])
        assert row[f"{prefix}reward/valid_fraction"] == pytest.approx(share), row["step"]
