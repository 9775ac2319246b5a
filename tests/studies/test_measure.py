"""Measuring the small UMM: what is asked and what counts as right."""

import json

import numpy as np
import pytest

from alphagrpo_jax.inference import TaskOutput
from alphagrpo_jax.shapes import checker, examples, image_records, questions, scenes, specs
from alphagrpo_jax.studies import drawings, measure, measure_skills, verifier_eval

RED, BLUE = scenes.SceneObject("circle", "red", 0, 2), scenes.SceneObject("square", "blue", 1, 0)
SCENE = scenes.Scene((RED, BLUE), "white")


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_captions_by_hand():
    assert measure_skills.captions("Describe the layout.", SCENE) == {
        "red circle top right, blue square middle left, white background",
        "blue square middle left, red circle top right, white background",
    }
    assert measure_skills.captions("Describe how two shapes lie.", SCENE) == {
        "a red circle to the right of a blue square",
        "a red circle above a blue square",
        "a blue square to the left of a red circle",
        "a blue square below a red circle",
    }
    twins = scenes.Scene((RED, scenes.SceneObject("circle", "red", 2, 2)), "gray")
    assert measure_skills.captions("What is in the image?", twins) == {"two red circles"}


def test_captions_are_those_of_pretraining(rng):
    instructions = set()
    for _ in range(200):
        example = examples.caption_example(rng)
        instructions.add(example.instruction)
        assert example.text in measure_skills.captions(example.instruction, example.scene)
    assert instructions == set(measure_skills.CAPTIONS)


def test_questions_have_the_scenes_answers(rng):
    types = set()
    for _ in range(60):
        scene = image_records.scene_of_split(rng, "heldout")
        assert specs.describe(scene).split == "heldout"
        text, answer, type_ = image_records.sample_question(scene, rng)
        types.add(type_)
        if type_ != "open":
            assert (answer == "yes") == questions.truth(
                verifier_eval.queries_by_text()[text], scene
            )
    assert types == {*questions.SEMANTIC, "open"}


def test_edits_change_the_scene(rng):
    for _ in range(60):
        scene, instruction, target = measure_skills.sample_edit(rng)
        assert specs.describe(scene).split == "heldout"
        assert instruction
        image = scenes.render(target)
        assert checker.shows_scene(image, target)
        assert not checker.shows_scene(image, scene)
        assert checker.exact_all(image, image_records.full_spec(target))


def test_skills_of_a_policy_that_does_nothing(monkeypatch):
    def idle(policy_, task, texts, images, **_):
        return TaskOutput(images, [["yes"] * len(texts)])

    monkeypatch.setattr(measure_skills, "run_task", idle)
    shares = measure_skills.measure(None, 40)
    assert shares["caption"] == shares["repair"] == shares["reflection"] == 0.0
    assert shares["edit/places"] == 0.0
    assert shares["edit"] < 0.5  # a move keeps all facts
    assert shares["answer/open"] == shares["answer/thinking/open"] == 0.0
    assert 0.2 < shares["answer/yes_no"] < 0.8


def test_shares_are_by_kind_and_type():
    right, wrong = scenes.render(SCENE), scenes.render(scenes.Scene((RED,), "white"))
    facts = specs.describe(SCENE).to_json()
    plain = {"kind": "plain", "type": "count", "facts": facts}
    implied = {"kind": "implied", "type": "two", "facts": facts}
    shares = measure.exact_shares([right, wrong, wrong], [plain, plain, implied])
    assert shares == {"implied": 0.0, "implied/two": 0.0, "plain": 0.5, "plain/count": 0.5}


def test_records_are_heldout_prompts_of_every_type():
    records = measure.heldout_records(2, 3)
    kinds = [record["kind"] for record in records]
    assert kinds == ["plain"] * 10 + ["implied"] * 3
    assert len({record["type"] for record in records[:10]}) == 5


def test_drawings_are_read_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    records = measure.heldout_records(1, 1)[:2]
    drawings.write(tmp_path / "drawings", images, records)
    images_read, records_read = drawings.read(tmp_path / "drawings")
    np.testing.assert_array_equal(images_read, images)
    assert records_read == json.loads(json.dumps(records))
    np.save(tmp_path / "other.npy", images)
    with pytest.raises(ValueError, match=r"expected an \.npz of images and records"):
        drawings.read(tmp_path / "other.npy")


def test_wrong_usage_and_missing_models(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        measure.main(["--skills", "--drawings", str(tmp_path / "x.npz")])
    assert stopped.value.code == 2
    capsys.readouterr()
    assert measure.main(["--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
