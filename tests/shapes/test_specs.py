"""Specs: canonical meaning, facts, sampling, JSON."""

import dataclasses
import json

import numpy as np
import pytest

from alphagrpo_jax.shapes import requests, scenes, specs
from alphagrpo_jax.shapes.specs import Group, Relation, Spec

RED_CIRCLE, BLUE_SQUARE = Group(1, "circle", "red"), Group(1, "square", "blue")


def scene_object(color, shape, row=0, col=0):
    return scenes.SceneObject(shape, color, row, col)


def test_combination_ignores_order_and_side():
    assert Spec((RED_CIRCLE, BLUE_SQUARE)).combination == "1 blue square + 1 red circle"
    assert Spec((BLUE_SQUARE, RED_CIRCLE)) != Spec((RED_CIRCLE, BLUE_SQUARE))
    left_of = Spec((RED_CIRCLE, BLUE_SQUARE), Relation("left of", 0, 1))
    right_of = Spec((BLUE_SQUARE, RED_CIRCLE), Relation("right of", 0, 1))
    assert left_of.combination == right_of.combination
    other_way = dataclasses.replace(right_of, relation=Relation("left of", 0, 1))
    assert left_of.combination != other_way.combination
    on_gray = Spec((Group(2, "cross", None),), None, "gray")
    assert on_gray.combination == "2 any cross | on gray"


def test_splits_are_about_80_8_12():
    rng = np.random.default_rng(0)
    combinations = {
        spec.combination: spec.split
        for spec in (requests.sample_plain(rng, "relation", None).spec for _ in range(3000))
    }
    counts = {name: list(combinations.values()).count(name) for name in specs.SPLITS}
    assert len(combinations) > 800
    assert counts["heldout"] / len(combinations) == pytest.approx(0.12, abs=0.03)
    assert counts["validation"] / len(combinations) == pytest.approx(0.08, abs=0.03)


def test_overlapping_groups_are_not_clear():
    assert Spec((RED_CIRCLE, BLUE_SQUARE)).unambiguous
    assert not Spec((Group(1, "circle", None), RED_CIRCLE)).unambiguous
    assert not Spec((Group(1, "circle", None), Group(1, None, "red"))).unambiguous
    assert Spec((Group(1, "circle", None), Group(1, "square", "red"))).unambiguous


def test_facts_by_hand():
    spec = Spec((RED_CIRCLE, BLUE_SQUARE), Relation("above", 0, 1), "white")
    fitting = [scene_object("red", "circle", 0, 0), scene_object("blue", "square", 1, 0)]
    assert specs.facts(spec, fitting, "white") == {
        "count 1 red circle": True,
        "count 1 blue square": True,
        "total": True,
        "relation": True,
        "background": True,
    }
    level = [scene_object("red", "circle", 1, 2), scene_object("blue", "square", 1, 0)]
    facts = specs.facts(spec, [*level, scene_object("red", "circle", 0, 0)], "gray")
    assert facts == {
        "count 1 red circle": False,
        "count 1 blue square": True,
        "total": False,
        "relation": False,
        "background": False,
    }
    assert not specs.facts(spec, fitting[:1], None)["relation"]


@pytest.mark.parametrize(
    ("name", "holds"), [("left of", True), ("right of", False), ("above", False), ("below", True)]
)
def test_related(name, holds):
    assert (
        specs.related(
            name, scene_object("red", "circle", 2, 0), scene_object("red", "circle", 1, 1)
        )
        == holds
    )
    with pytest.raises(ValueError, match="unknown relation 'near'"):
        specs.related("near", scene_object("red", "circle"), scene_object("red", "circle"))


def test_sampled_scenes_fulfil_their_specs():
    rng = np.random.default_rng(1)
    for _ in range(300):
        spec = (requests.sample_plain if rng.random() < 0.5 else requests.sample_implied)(rng).spec
        scene = specs.sample_scene(spec, rng)
        assert specs.satisfied(spec, scene)
        assert len({(t.row, t.col) for t in scene.objects}) == len(scene.objects) == spec.total
        assert max(abs(v) for t in scene.objects for v in (t.dx, t.dy)) <= scenes.MAX_JITTER


def test_too_many_shapes():
    with pytest.raises(ValueError, match="4 shapes"):
        specs.sample_scene(Spec((Group(4, None, None),)), np.random.default_rng(0))


def test_json_round_trip():
    spec = Spec((RED_CIRCLE, Group(1, None, "blue")), Relation("below", 1, 0), "black")
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(ValueError, match="not a shapes-world spec"):
        Spec.from_json({"groups": [{"count": 1}]})
