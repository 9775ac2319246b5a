"""Figures of rewards by hand: pairs, ties, intervals, agreement with the exact checker."""

import json

import numpy as np
import pytest

from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.shapes import grammar, scenes
from alphagrpo_jax.studies import drawings as drawings_lib
from alphagrpo_jax.studies import reward_figures

RED, BLUE = scenes.SceneObject("circle", "red", 0, 2), scenes.SceneObject("square", "blue", 1, 0)
BOTH, ONE = scenes.Scene((RED, BLUE), "white"), scenes.Scene((RED,), "white")
PROMPT = "a red circle above a blue square"


class Answers:
    """Answers every question by a table of the image's number of colors; rates 10 times that."""

    def __init__(self, p_yes):
        self.p_yes, self.submitted = p_yes, {}

    def submit(self, sample_id, image, questions, rated=(), scored=()):
        colors = len(np.unique(image.reshape(-1, 3), axis=0))
        self.submitted[sample_id] = (self.p_yes[colors], len(questions), len(rated))

    def gather(self, ids):
        results = {}
        for sample_id in ids:
            p, num_questions, num_rated = self.submitted[sample_id]
            results[sample_id] = (
                VerifierResult(None, False, "away", 1, None, 0.0)
                if p is None
                else VerifierResult(
                    (p,) * num_questions, True, None, 1, 0, 0.0, (10 * p,) * num_rated
                )
            )
        return results


def test_pairs_of_one_prompt_that_differ():
    prompts = ["a", "a", "a", "b", "b", "c"]
    exact = np.array([1.0, 0.5, 0.5, 0.2, 0.8, 1.0])
    score = np.array([0.9, 0.9, 0.1, 0.7, 0.3, 0.0])
    # a: (0, 1) is a tie, (0, 2) right, (1, 2) does not differ; b: wrong; c: alone
    assert reward_figures.pair_counts(prompts, exact, score) == {"a": (1.5, 2), "b": (0.0, 1)}


def test_share_and_interval():
    figures = reward_figures.share({"a": (1.5, 2), "b": (0.0, 1), "c": (1.0, 1)}, seed=0)
    assert (figures["pairs"], figures["prompts"]) == (4, 3)
    assert figures["share"] == pytest.approx(2.5 / 4)
    low, high = figures["interval"]
    assert low == 0.0  # of 27 equally likely draws one holds b alone
    assert high == 1.0  # and one c alone
    assert reward_figures.share({"a": (3.0, 4)}, seed=0)["interval"] == [0.75, 0.75]
    assert reward_figures.share({}, seed=0) == {"pairs": 0}
    gain = reward_figures.share(
        {"a": (2.0, 2), "b": (1.0, 1)}, 0, minus={"a": (1.0, 2), "b": (0.5, 1)}
    )
    assert gain["share"] == 0.5
    assert gain["interval"] == [0.5, 0.5]  # half of every prompt's pairs, whichever are drawn


@pytest.fixture
def drawings():
    """The same prompt three times: right, one shape missing, and not judged."""
    images = np.stack([scenes.render(scene) for scene in (BOTH, ONE, BOTH)])
    images[2, 0, 0] = (1, 2, 3)
    fields = [grammar.record(PROMPT) | {"kind": "plain"} for _ in images]
    return images, fields


def test_drawings_that_are_not_judged_are_left_out(drawings):
    images, fields = drawings
    records = [parse_record(record) for record in fields]
    colors = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
    assert len(set(colors)) == 3
    pool = Answers(dict(zip(colors, (0.8, 0.6, None), strict=True)))
    judged = reward_figures.score_images(pool, images, records)
    assert judged.index.tolist() == [0, 1]
    assert judged.failures == {"away": 1}
    assert judged.scores["confidence"] == pytest.approx([0.8, 0.6])
    assert judged.scores["holistic"] == pytest.approx([0.8, 0.6])
    assert judged.scores["binary"].tolist() == [1.0, 1.0]
    rankings = reward_figures.ranking(fields, np.array([1.0, 0.5, 0.0]), judged, seed=0)
    assert set(rankings) == {"all", "plain"}
    shares = {name: figures["share"] for name, figures in rankings["plain"].items()}
    gains = {name: shares.pop(name) for name in list(shares) if " - " in name}
    assert shares == {"confidence": 1.0, "binary": 0.5, "holistic": 1.0, "dependent": 1.0}
    assert gains == {
        "confidence - binary": 0.5, "confidence - holistic": 0.0, "confidence - dependent": 0.0
    }  # fmt: skip
    agreement = reward_figures.agreement(images, records, judged)
    num_questions = len(records[0].asked_semantic)
    assert agreement["all"]["questions"] == 2 * num_questions
    # Everything is true of the first image; P(yes) is above 1/2 throughout.
    assert agreement["all"]["agreement"] == agreement["all"]["true"] >= 0.5
    assert agreement["all"]["true"] < 1.0
    assert {"Spatial"} < set(agreement) - {"all"}


def test_the_command_reads_drawings_and_writes_figures(drawings, tmp_path, capsys, monkeypatch):
    images, fields = drawings
    drawings_lib.write(tmp_path / "x.npz", images[:2], fields[:2])
    out = tmp_path / "figures.json"
    arguments = ["--drawings", str(tmp_path / "x.npz"), "--workers", "1", "--out", str(out)]
    assert reward_figures.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads(out.read_text())
    assert (figures["drawings"], figures["judged"]) == (2, 2)
    assert figures["ranking"]["plain"]["confidence"]["share"] == 1.0  # the shipped verifier can


def test_bad_input(tmp_path, capsys):
    assert reward_figures.main(["--drawings", str(tmp_path / "none.npz")]) == 1
    assert "none.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        reward_figures.main(["--drawings", "x.npz", "--limit", "0"])
    assert stopped.value.code == 2
