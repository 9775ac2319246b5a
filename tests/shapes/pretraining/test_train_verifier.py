import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from alphagrpo_jax.rewards.verifiers.base import Answer
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.shapes import checker, corrupt, questions, scenes
from alphagrpo_jax.shapes.pretraining import muon, verifier_data, verifier_model
from alphagrpo_jax.shapes.pretraining import train_verifier as script
from alphagrpo_jax.shapes.pretraining import verifier_packed as packed
from alphagrpo_jax.shapes.pretraining.verifier_data import BatchEncoder, LabeledImage
from alphagrpo_jax.studies import measure, verifier_eval
from alphagrpo_jax.studies.verifier_eval import balanced, calibration_error

pytestmark = pytest.mark.torch

SCENE = scenes.Scene(
    (scenes.SceneObject("circle", "red", 0, 2), scenes.SceneObject("square", "blue", 1, 0)), "white"
)
EXAMPLE = LabeledImage(scenes.render(SCENE), SCENE, corrupt.SOUND, (), SCENE)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    model, processor = verifier_model.build_verifier(verifier_data.vocabulary(draws=50))
    return model.eval(), BatchEncoder(processor.tokenizer)


def test_vocabulary_words_are_single_tokens(built):
    tokenizer = built[1].tokenizer
    for word in ("yes", "no", "10", "circle", "triangles", "purple", "background"):
        assert len(tokenizer(word)["input_ids"]) == 1
    assert tokenizer.unk_token_id not in tokenizer("Is a zebra (1.5 m) there?")["input_ids"]


def test_prefix_is_what_the_chat_template_renders(built):
    processor = verifier_model.build_processor(built[1].tokenizer)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": AUDIT_INSTRUCTION}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[EXAMPLE.image], return_tensors="pt")
    tokens = [*built[1].prefix(AUDIT_INSTRUCTION).tolist(), *built[1].question("Is it?")]
    assert inputs["input_ids"][0].tolist() == tokens
    torch.testing.assert_close(
        inputs["pixel_values"], verifier_data.pixels([EXAMPLE.image]), atol=1e-6, rtol=0
    )


def test_packed_forward_is_the_models_own(built):
    model, encoder = built
    rng = np.random.default_rng(0)
    examples = [verifier_data.sample_labeled_image(rng) for _ in range(2)]
    question_rows = [verifier_data.questions_about(example, rng, 3) for example in examples]
    batch = encoder.batch(examples, question_rows)
    prefix = encoder.prefix(AUDIT_INSTRUCTION)
    with torch.no_grad():
        start = packed.embed_prefix(model, prefix, packed.patch_features(model, batch.pixels))
        states = packed.question_states(model, start, batch.tokens, batch.ends)
        got = model.lm_head(packed.last_states(states.final, batch.ends))
        for n, row in enumerate(question_rows):
            for q, (text, *_) in enumerate(row):
                tokens = torch.cat([prefix, torch.tensor(encoder.question(text))])
                expected = model(
                    input_ids=tokens[None], pixel_values=batch.pixels[n : n + 1]
                ).logits[0, -1]
                torch.testing.assert_close(got[n, q], expected, atol=1e-5, rtol=0)


def test_dense_labels_mark_two_by_two_patches():
    shape, color = (labels.reshape(6, 6) for labels in verifier_data.dense_labels(EXAMPLE))
    nothing = verifier_data.NO_SHAPE
    assert shape[0].tolist() == [nothing] * 4 + [scenes.SHAPES.index("circle")] * 2
    assert shape[2].tolist() == [scenes.SHAPES.index("square")] * 2 + [nothing] * 4
    assert color[1, 5] == list(scenes.COLORS).index("red")
    damaged = dataclasses.replace(EXAMPLE, damaged=(0,))
    assert verifier_data.dense_labels(damaged)[0].reshape(6, 6)[0, 4] == verifier_data.IGNORE


def test_dense_faults_are_known_where_the_damage_is():
    assert verifier_data.dense_faults(EXAMPLE).sum() == 0
    labels = {"geometry": False, "coherence": True}  # texture is left open
    damaged = dataclasses.replace(EXAMPLE, labels=labels, faulty=(1,))
    geometry, coherence, texture = verifier_data.dense_faults(damaged).reshape(6, 6, 3).T
    assert geometry.T[2, :2].tolist() == [1, 1]  # the square's cell, patches in row 2
    assert np.isnan(geometry.T[0]).all()
    assert (coherence == 0).all()
    assert np.isnan(texture).all()


def test_dense_change_is_the_log_of_the_patchs_root_mean_square():
    image = EXAMPLE.image.copy()
    image[:8, :8] = 248 - 51  # 51 / 127.5 = 0.4 in the first, white patch
    change = verifier_data.dense_change(dataclasses.replace(EXAMPLE, image=image))
    np.testing.assert_allclose(change[:2], [np.log(0.41), np.log(0.01)], rtol=1e-5)


def test_named_cells_follow_the_phrase():
    question = "Is the red circle above the blue square?"
    assert verifier_data.noun_phrases(question) == ((3, "circle", "red"), (7, "square", "blue"))
    assert verifier_data.named_cells(EXAMPLE, "circle", "red").nonzero()[0].tolist() == [2]
    assert verifier_data.named_cells(EXAMPLE, "shape", None).nonzero()[0].tolist() == [2, 3]
    assert verifier_data.named_cells(EXAMPLE, "circle", "blue").sum() == 0
    damaged = dataclasses.replace(EXAMPLE, damaged=(0,))
    assert verifier_data.named_cells(damaged, "shape", None) is None


def test_questions_have_the_truth_of_the_scene_and_come_in_full_number():
    rng = np.random.default_rng(0)
    answers = {}
    for _ in range(60):
        triples = verifier_data.questions_about(EXAMPLE, rng, 12)
        assert len(triples) == 12
        answers.update({text: word for text, word, _ in triples})
    assert answers["Is the red circle to the right of the blue square?"] == "yes"
    assert answers["Is the red circle to the left of the blue square?"] == "no"
    assert answers["Are there exactly two shapes?"] == "yes"
    assert answers["Is the background black?"] == "no"
    assert answers["Are the colours flat and clean?"] == "yes"


def test_ratings_are_shares_of_facts():
    rng = np.random.default_rng(0)
    for _ in range(20):
        for _, rating, kind in verifier_data.ratings_about(EXAMPLE, rng):
            assert 0 <= int(rating) <= 10
            if kind == "drawing":
                assert rating == "10"
    blurred = dataclasses.replace(EXAMPLE, labels={**corrupt.SOUND, "texture": False})
    assert verifier_data.ratings_about(blurred, rng)[-1][1] == "6"


def test_orthogonalize_gives_singular_values_near_one():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for x in (matrices, matrices.transpose(1, 2)):
        values = torch.linalg.svdvals(muon.orthogonalize(x))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [script.learning_rate(step, 1000, 2.0) for step in (0, 24, 49, 500, 750, 1000)]
    np.testing.assert_allclose(rates, [0.04, 1.0, 2.0, 2.0, 1.0, 0.0])


def test_calibration_error_and_balanced_accuracy():
    rows = [("count", True, 0.9), ("count", True, 0.2), ("count", False, 0.1)]
    rows.append(("texture", True, 0.8))
    assert balanced(rows) == {"count": 0.75, "texture": 1.0}
    # Bins 9, 2, 1, 8 hold one row each: |0.9 - 1|, |0.2 - 1|, |0.1 - 0|, |0.8 - 1|.
    assert calibration_error(rows) == pytest.approx((0.1 + 0.8 + 0.1 + 0.2) / 4)


class Reader:
    """Answers semantic questions as the exact checker sees the image; remembers what it is asked.

    With `always`, says that instead.
    """

    def __init__(self, always=None):
        self.always, self.lists = always, []

    def answer(self, image, texts):
        self.lists.append(tuple(texts))
        if self.always is not None:
            return [Answer(self.always) for _ in texts]
        parsed = checker.parse(image)
        scene = scenes.Scene(parsed.objects, parsed.background)
        queries = (verifier_eval.queries_by_text()[text] for text in texts)
        return [Answer(float(questions.truth(query, scene))) for query in queries]


def test_questions_of_the_evaluation_are_different_ones():
    rng = np.random.default_rng(0)
    for clean in (True, False):
        for _ in range(20):
            example = verifier_eval.heldout_example(rng, clean=clean)
            texts = [text for text, *_ in verifier_eval.sample_questions(example, rng)]
            assert len(texts) == len(set(texts)) == verifier_eval.QUESTIONS


def test_timed_lists_are_different_ones():
    lists = verifier_eval.timed_lists(seed=0, images=20)
    assert len({texts for _, texts in lists}) == len(lists) == 20
    again = verifier_eval.timed_lists(seed=1, images=20)
    assert not {texts for _, texts in lists} & {texts for _, texts in again}


def test_meanings_of_questions():
    queries = verifier_eval.queries_by_text()
    for text, query in (
        ("Is the circle red?", questions.has_color("circle", "red")),
        ("Are there exactly two shapes?", questions.counts(questions.Group(2, None, None))),
        ("Is the background black?", questions.has_background("black")),
    ):
        assert queries[text] == query
    for record in measure.heldout_records(8, 20):
        texts = [fields["question"] for fields in record["semantic_questions"]]
        assert set(texts) <= set(queries)


def test_agreement_about_drawings():
    records = measure.heldout_records(1, 1)
    right = next(record for record in records if record["type"] == "background")
    blank = np.full((48, 48, 3), scenes.BACKGROUNDS["white"], np.uint8)
    render = scenes.render(scenes.Scene(_objects(right["facts"]), right["facts"]["background"]))
    foreign = render.copy()
    foreign[34:46, 2:14] = (110, 70, 40)  # a brown square
    images, records_of_images = np.stack([render, blank, foreign]), [right, right, right]
    shares = verifier_eval.agreement(Reader(), images, records_of_images)
    assert shares["drawings"] == 3
    assert shares["parsed"] == pytest.approx(2 / 3)  # the last one is not read
    assert shares["agreement"] == 1.0
    assert shares["exact"] == pytest.approx(1 / 3)
    # The brown square is no semantic question's matter: all are answered with yes.
    assert shares["all_yes"] == pytest.approx(2 / 3)
    assert shares["all_yes_agreement"] == pytest.approx(2 / 3)
    assert (shares["all_yes_if_exact"], shares["all_yes_if_wrong"]) == (1.0, 0.5)
    shares_of_yes = verifier_eval.agreement(Reader(always=0.9), images, records_of_images)
    assert 0 < shares_of_yes["agreement"] < 1
    assert (shares_of_yes["all_yes"], shares_of_yes["all_yes_if_wrong"]) == (1.0, 1.0)


def _objects(facts):
    """One shape per member of fully given groups, from the upper left on."""
    kinds = [(g["shape"], g["color"]) for g in facts["groups"] for _ in range(g["count"])]
    return tuple(
        scenes.SceneObject(shape, color, 0, col) for col, (shape, color) in enumerate(kinds)
    )


def test_temperature_undoes_overconfidence():
    margins = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    truths = draws < torch.sigmoid(margins)
    assert script.temperature(truths, 3 * margins) == pytest.approx(3.0, abs=0.15)
    assert script.accuracies(["count"] * 2, torch.tensor([True, False]), torch.ones(2)) == {
        "count": 0.5
    }


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "IMAGES", {"vision": 2, "joint": 2})
    monkeypatch.setattr(script, "QUESTIONS", 2)
    steps = {"vision": 2, "joint": 3}

    def run(name: str, *, stop: int | None) -> script.Trainer:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        trainer = script.Trainer(out, 0, steps)
        trainer.restore()
        if stop is None:
            script.train(trainer, save_every=1)
        else:
            for _ in range(stop):
                trainer.update()
            trainer.save()
        return trainer

    uninterrupted = run("whole", stop=None)
    run("parts", stop=1)
    resumed = run("parts", stop=None)
    for a, b in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: the run has 0, this start 1"),
        ({"joint_lr": 1e-3}, "joint_lr: the run has 0.003, this start 0.001"),
        ({"start": pathlib.Path("x")}, "start: the run has 'None', this start 'x'"),
        ({"steps": {"vision": 2, "joint": 1}}, "vision_steps: the run has 1, this start 2"),
    ],
)
def test_checkpoint_of_another_run_is_refused(changes, message, tmp_path):
    options = {"out": tmp_path, "seed": 0, "steps": {"vision": 1, "joint": 1}}
    script.Trainer(**options).save()
    with pytest.raises(ValueError, match=message):
        script.Trainer(**options | changes).restore()
    later = {"steps": {"vision": 1, "joint": 9}}  # that stage has not begun
    assert script.Trainer(**options | later).restore()


def test_questions_about_odd_scenes_have_no_shapes_or_four():
    rng = np.random.default_rng(3)
    counts = set()
    for _ in range(200):
        example = verifier_data.sample_labeled_image(rng)
        counts.add(len(example.scene.objects))
        triples = verifier_data.questions_about(example, rng, 4)
        assert len(triples) == 4
        assert {type_ for *_, type_ in triples} <= set(questions.TYPES)
    assert counts == {0, 1, 2, 3, 4}


def test_what_is_not_known_is_not_learned():
    logits = torch.tensor([0.0, 2.0, -1.0])
    wanted = torch.tensor([1.0, float("nan"), 0.0])
    expected = (np.log(2.0) + np.log1p(np.exp(-1.0))) / 2
    assert script.labeled_bce(logits, wanted).item() == pytest.approx(expected, rel=1e-6)
    assert script.labeled_bce(logits, torch.full((3,), float("nan"))).item() == 0.0
