"""Kept verdicts: read back, refused for anything else, and those in docs/study still valid."""

import json
import pathlib

import numpy as np
import pytest

from alphagrpo_jax import config_checks
from alphagrpo_jax.shapes import checker, image_records
from alphagrpo_jax.studies import measure, rt2i, srr, verdicts

STUDY = pathlib.Path(__file__).parents[2] / "docs" / "study"


def bools(text: str) -> np.ndarray:
    return np.array([mark == "1" for mark in text], bool)


def test_judgements_are_kept(tmp_path: pathlib.Path):
    path, about = tmp_path / "a.json", {"model": "abc", "tokens": (32, 40)}

    def refuse():
        raise AssertionError("drawn again")

    exact = verdicts.load_or_judge(path, lambda: bools("101"), about)
    np.testing.assert_array_equal(exact, bools("101"))
    np.testing.assert_array_equal(verdicts.load_or_judge(path, refuse, about), bools("101"))
    with pytest.raises(ValueError, match=r"other model: got \['abc'\], expected \['abd'\]"):
        verdicts.load_or_judge(path, refuse, about | {"model": "abd"})
    with pytest.raises(ValueError, match="other checker"):
        verdicts.load_or_judge(path, refuse, about | {"checker": "1"})
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match="delete it"):
        verdicts.load_or_judge(path, refuse, about)


def test_digests_follow_the_contents(tmp_path: pathlib.Path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    assert verdicts.files_digest(a, b) != verdicts.files_digest(b, a)
    assert verdicts.files_digest(a) == verdicts.files_digest(a)
    before = verdicts.files_digest(a, b)
    b.write_bytes(b"3")
    assert verdicts.files_digest(a, b) != before


def test_kept_verdicts_belong_to_the_present_code():
    """Prompts, checker, model and settings: else `launch/study.sh` would refuse docs/study."""
    records, _ = rt2i.study_records()
    expected = json.loads(json.dumps(verdicts.verdict_key(config_checks.read_config(), records)))
    files = [*STUDY.glob("run_*.json"), *STUDY.glob("untrained*.json")]
    assert len(files) == 9
    for path in files:
        about = json.loads(path.read_text())["about"]
        assert {name: about[name] for name in expected} == expected, path.name


def test_kept_refinements_belong_to_the_present_code():
    prompts = measure.heldout_records(srr.PER_PLAIN_TYPE, srr.IMPLIED)
    edits = image_records.records("edit", "heldout", srr.EDITS, seed=srr.SEED)
    files = list(STUDY.glob("refine_*.json"))
    assert len(files) == 5
    for path in files:
        about = json.loads(path.read_text())["about"]
        assert about["checker"] == checker.RULES
        assert about["prompts"] == srr.records_digest(prompts)
        assert about["edits"] == srr.records_digest(edits)
