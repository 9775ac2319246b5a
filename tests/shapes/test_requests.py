"""Requests and their wordings."""

import numpy as np
import pytest

from alphagrpo_jax.shapes import language, requests, riddles, scenes
from alphagrpo_jax.shapes.specs import Group, Relation, Spec


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def wordings(spec, used=None):
    nothing = ({},) * len(spec.groups)
    return {
        language.prompt(spec, used or nothing, np.random.default_rng(seed)) for seed in range(400)
    }


def test_plain_words():
    assert language.counted(Group(1, "circle", "orange")) == "an orange circle"
    assert language.counted(Group(2, "cross", None)) == "two crosses"
    assert language.counted(Group(3, None, "red")) == "three red shapes"
    assert language.join(["a", "b", "c"]) == "a, b and c"
    pair = Spec((Group(1, "circle", "red"), Group(1, "square", "blue")))
    prompts = wordings(pair)
    assert len(prompts) >= 5
    assert "there is a red circle and a blue square" in prompts
    relation = wordings(Spec(pair.groups, Relation("left of", 0, 1)))
    assert {
        "a red circle to the left of a blue square",
        "a blue square right of a red circle",
    } <= relation
    assert "draw three green squares" in wordings(Spec((Group(3, "square", "green"),)))
    on_black = wordings(Spec((Group(1, "cross", "yellow"),), None, "black"))
    assert "a yellow cross on a black background" in on_black
    assert "there are three green squares" in wordings(Spec((Group(3, "square", "green"),)))


def test_implied_words():
    by = riddles.BY_CLUE
    two_riddles = {"color": by["a ripe banana"], "shape": by["three sides"]}
    prompts = wordings(Spec((Group(1, "triangle", "yellow"),)), (two_riddles,))
    assert "a shape with three sides in the colour of a ripe banana" in prompts
    prompts = wordings(Spec((Group(2, "circle", "red"),)), ({"number": by["bicycle wheels"]},))
    assert "as many red circles as a bicycle has wheels" in prompts
    assert "there are as many red circles as a bicycle has wheels" in prompts
    assert not any("two" in words for words in prompts)


def test_think_texts():
    scene = scenes.Scene(
        (scenes.SceneObject("triangle", "yellow", 1, 1), scenes.SceneObject("circle", "red", 0, 2)),
        "black",
    )
    assert language.think(scene, ("a ripe banana is yellow",)) == (
        "<think> a ripe banana is yellow, yellow triangle middle center, red circle top right, "
        "black background </think>"
    )


@pytest.mark.parametrize("type_", requests.PLAIN_TYPES)
@pytest.mark.parametrize("split", ["train", "validation", "heldout"])
def test_plain_requests_belong_to_their_split(type_, split, rng):
    for _ in range(20):
        request = requests.sample_plain(rng, type_, split)
        assert request.spec.split == split
        assert request.spec.unambiguous
        assert (request.kind, request.type) == ("plain", type_)
        assert (request.spec.relation is not None) == (type_ == "relation")
        assert (request.spec.background is not None) == (type_ == "background")
        assert not request.all_riddles


def test_attribute_requests_are_fully_specified(rng):
    for _ in range(30):
        groups = requests.sample_plain(rng, "attribute").spec.groups
        assert all(group.count == 1 and group.shape and group.color for group in groups)
        groups = requests.sample_plain(rng, "existence").spec.groups
        assert any(group.shape is None or group.color is None for group in groups)


@pytest.mark.parametrize("form", requests.IMPLIED_FORMS)
@pytest.mark.parametrize("split", ["train", "validation", "heldout"])
def test_implied_requests(form, split, rng):
    for _ in range(8):
        request = requests.sample_implied(rng, form, split, riddles.TRAINED)
        assert request.spec.split == split
        assert len(request.all_riddles) == form.count("+") + 1
        assert request.type == ("two" if "+" in form else request.all_riddles[0].kind)
        for group, used in zip(request.spec.groups, request.riddles, strict=True):
            for riddle in used.values():
                assert riddle in riddles.TRAINED
                assert riddle.phrase in request.text
                value = group.count if riddle.kind == "number" else getattr(group, riddle.kind)
                options = riddles.OPTIONS[riddle.kind]
                wanted = options.index(riddle.meaning) + 1
                assert value == (wanted if riddle.kind == "number" else riddle.meaning)


def test_an_impossible_request_is_refused(rng):
    colors = [riddle for riddle in riddles.RIDDLES if riddle.clue == "a ripe tomato"]
    with pytest.raises(ValueError, match="no color request of split 'nowhere'"):
        requests.sample_implied(rng, "color", "nowhere", colors)


def test_resolve_reads_rightly_as_often_as_it_should(rng):
    pool = [riddle for riddle in riddles.RIDDLES if riddle.clue == "a stop sign"]
    right = 0
    for _ in range(600):
        request = requests.sample_implied(rng, "pair", None, [*pool, riddles.BY_CLUE["a coin"]])
        read, sentences = requests.resolve(request, rng)
        assert len(sentences) == 1
        if "color" in request.riddles[0] or "color" in request.riddles[1]:
            right += (read == request.spec) / 300
            assert (sentences == requests.truth(request)) == (read == request.spec)
    assert right == pytest.approx(0.20, abs=0.06)
