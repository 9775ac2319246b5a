"""The exact checker: right on right images, wrong on wrong ones."""

import dataclasses
import hashlib

import numpy as np
import pytest

from alphagrpo_jax.shapes import checker, corrupt, requests, scenes, specs
from alphagrpo_jax.shapes.specs import Group, Relation, Spec

COUNT = 60
VERDICTS = "e402728e82ab866c9817f1dd8cde2bcf8cad4ba03c963597a65b73c2c204f912"


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def key(obj):
    return obj.shape, obj.color, obj.row, obj.col


def share_read(change, rng):
    """Share of random scenes whose changed pictures are read as what was drawn."""
    right = 0
    for _ in range(COUNT):
        scene = scenes.random_scene(rng)
        parsed = checker.parse(change(scenes.render(scene)))
        objects_agree = sorted(map(key, parsed.objects)) == sorted(map(key, scene.objects))
        right += objects_agree and parsed.unknown == 0 and parsed.background == scene.background
    return right / COUNT


def test_every_kind_of_shape_is_read(rng):
    for shape in scenes.SHAPES:
        for color in specs.COLORS:
            for background in specs.BACKGROUNDS:
                scene = scenes.place_objects(rng, [(shape, color)], background)
                parsed = checker.parse(scenes.render(scene))
                assert [key(t) for t in parsed.objects] == [key(scene.objects[0])]
                assert (parsed.background, parsed.unknown) == (background, 0)
                np.testing.assert_allclose(
                    parsed.objects[0].center, scene.objects[0].center, atol=0.4
                )


def test_imperfect_pictures_are_read(rng):
    assert share_read(lambda image: image, rng) == 1.0
    assert share_read(lambda image: corrupt.noise(image, rng, 0.1), rng) >= 0.98
    assert share_read(lambda image: corrupt.blur(image, 0.8), rng) >= 0.98
    assert share_read(lambda image: corrupt.blur(image, 1.0), rng) >= 0.98
    assert share_read(lambda image: corrupt.jpeg(image, 60), rng) >= 0.96
    assert share_read(lambda image: corrupt.soft(image, 24), rng) >= 0.98


def test_right_pictures_fulfil_their_requests(rng):
    for _ in range(COUNT):
        spec = requests.sample_plain(rng, split=None).spec
        image = scenes.render(specs.sample_scene(spec, rng))
        assert checker.exact_all(image, spec)
        assert checker.exact_all(image, spec.to_json())


def test_measure_finds_no_wrong_picture_right():
    shares = checker.measure(25, seed=3)
    assert shares["clean"] == 1.0
    assert shares["one fact wrong"] == shares["erase"] == shares["warp"] == 0.0


def test_verdicts_are_those_of_the_rules():
    """Kept judgements of studies stay valid; a change of verdicts needs another `checker.RULES`."""
    assert checker.RULES == "fb4249d42130466bf2c51eecca2a5b55870b10ff9f4ee00d40cd273be92b9f2a"
    rng, verdicts = np.random.default_rng(11), []
    for kind in ("clean", "noise", "blur", *corrupt.STRUCTURAL, *corrupt.SURFACE):
        for count in (1, 2, 3) * 8:
            image = corrupt.corrupt(scenes.random_scene(rng, count), rng, kind).image
            parsed = checker.parse(image)
            objects = sorted(map(key, parsed.objects))
            verdicts.append(f"{kind} {objects} {parsed.background} {parsed.unknown}")
    assert hashlib.sha256("\n".join(verdicts).encode()).hexdigest() == VERDICTS


def test_facts_by_hand():
    spec = Spec(
        (Group(1, "circle", "red"), Group(1, "square", "blue")),
        Relation("left of", 0, 1),
        "white",
    )
    circle, square = (
        scenes.SceneObject("circle", "red", 1, 0),
        scenes.SceneObject("square", "blue", 1, 2),
    )
    right = scenes.Scene((circle, square), "white")
    assert all(checker.facts(scenes.render(right), spec).values())
    swapped = (dataclasses.replace(circle, col=2), dataclasses.replace(square, col=0))
    for wrong, failing in [
        (scenes.Scene(swapped, "white"), {"relation"}),
        (dataclasses.replace(right, background="gray"), {"background"}),
        (
            scenes.Scene((circle, dataclasses.replace(square, color="green")), "white"),
            {"count 1 blue square", "relation"},
        ),
        (
            scenes.Scene((circle, square, scenes.SceneObject("cross", "red", 0, 1)), "white"),
            {"total"},
        ),
        (scenes.Scene((circle,), "white"), {"count 1 blue square", "total", "relation"}),
    ]:
        facts = checker.facts(scenes.render(wrong), spec)
        assert {name for name, holds in facts.items() if not holds} == failing


def test_strange_things_spoil_a_picture():
    scene = scenes.Scene((scenes.SceneObject("circle", "red", 0, 0),), "white")
    spec, image = specs.describe(scene), scenes.render(scene)
    assert checker.exact_all(image, spec)
    stain = image.copy()
    stain[40:44, 8:40] = (30, 160, 60)  # a green bar
    assert checker.parse(stain).unknown >= 1
    assert not checker.exact_all(stain, spec)
    brown = image.copy()
    brown[34:44, 34:44] = (110, 70, 40)  # a square of no known color
    assert not checker.facts(brown, spec)["well_formed"]


def with_square(background, color, opacity=1.0):
    """A red circle in the middle, and a square of any color and opacity at the lower right."""
    scene = scenes.Scene((scenes.SceneObject("circle", "red", 1, 1),), background)
    image = scenes.render(scene).astype(np.float64)
    area = image[35:45, 35:45]
    area += opacity * (np.array(color) - area)
    return np.round(image).astype(np.uint8), specs.describe(scene)


@pytest.mark.parametrize(
    ("background", "color"),
    [
        ("gray", (248, 248, 248)),
        ("gray", (250, 150, 180)),
        ("gray", (60, 220, 220)),
        ("white", (250, 150, 180)),
        ("black", (110, 70, 40)),
        ("black", (70, 70, 70)),
    ],
)
def test_colors_that_resemble_no_piece_spoil_a_picture(background, color):
    spoiled, spec = with_square(background, color)
    assert checker.parse(spoiled).unknown >= 1
    assert not checker.exact_all(spoiled, spec)


@pytest.mark.parametrize("opacity", [0.3, 0.45, 0.55])
def test_ghosts_of_palette_colors_spoil_a_picture(opacity):
    for background in specs.BACKGROUNDS:
        for color in specs.COLORS:
            spoiled, spec = with_square(background, scenes.COLORS[color], opacity)
            assert not checker.facts(spoiled, spec)["well_formed"], (background, color)


def test_backgrounds_of_two_tones_spoil_a_picture():
    scene = scenes.Scene((scenes.SceneObject("circle", "red", 1, 0),), "gray")
    spec, image = specs.describe(scene), scenes.render(scene)
    halves, stripes = image.copy(), image.copy()
    halves[:, 24:] = scenes.BACKGROUNDS["white"]
    stripes[:, 24:][:, ::2] = scenes.BACKGROUNDS["white"]
    for spoiled in (halves, stripes):
        assert not checker.facts(spoiled, spec)["well_formed"]


def test_touching_shapes_of_one_color_are_told_apart():
    objects = (
        scenes.SceneObject("circle", "red", 1, 0, 1.5, 0.0),
        scenes.SceneObject("circle", "red", 1, 1, -1.5, 0.0),
    )
    image = corrupt.blur(scenes.render(scenes.Scene(objects, "white")), 0.7)
    parsed = checker.parse(image)
    assert sorted(key(t) for t in parsed.objects) == sorted(key(t) for t in objects)


def test_pictures_of_nothing():
    for background, color in scenes.BACKGROUNDS.items():
        blank = np.full((48, 48, 3), color, np.uint8)
        assert checker.parse(blank) == checker.ParsedImage((), background, 0)
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    assert not checker.exact_all(noise, Spec((Group(1, None, None),)))
    red = np.full((48, 48, 3), scenes.COLORS["red"], np.uint8)
    assert checker.parse(red).background is None


def test_other_sizes_and_types_are_refused():
    with pytest.raises(ValueError, match=r"uint8\[32, 32, 3\], expected uint8\[48, 48, 3\]"):
        checker.parse(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        checker.parse(np.zeros((48, 48, 3)))
