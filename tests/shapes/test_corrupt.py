"""Imperfect images: labels, strengths, and that damage is seen."""

import numpy as np
import pytest

from alphagrpo_jax.shapes import checker, corrupt, scenes, specs


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", corrupt.KINDS)
def test_kinds(kind, rng):
    for _ in range(6):
        scene = scenes.random_scene(rng, 2)
        corruption = corrupt.corrupt(scene, rng, kind)
        assert corruption.kind == kind
        assert corruption.image.shape == (48, 48, 3)
        assert corruption.image.dtype == np.uint8
        assert set(corruption.labels) <= {"geometry", "coherence", "texture"}
        assert bool(corruption.damaged) == (kind in corrupt.STRUCTURAL)
        assert bool(corruption.faulty) == (kind in (*corrupt.STRUCTURAL, *corrupt.SURFACE))
        unchanged = np.array_equal(corruption.image, scenes.render(scene))
        assert unchanged == (kind == "clean")


def test_labels():
    scene = scenes.random_scene(np.random.default_rng(1), 2)

    def labels(kind):
        return corrupt.corrupt(scene, np.random.default_rng(2), kind).labels

    assert labels("clean") == {"geometry": True, "coherence": True, "texture": True}
    assert labels("erase") == {"geometry": False, "coherence": False, "texture": True}
    assert labels("warp")["coherence"]
    assert not labels("stripes")["texture"]
    assert "geometry" not in labels("merge")


def test_mild_and_strong_noise_are_apart(rng):
    image = np.full((48, 48, 3), 128, np.uint8)
    mild = [corrupt.photometric(image, rng, "noise", mild=True).std() for _ in range(20)]
    strong = [corrupt.photometric(image, rng, "noise", mild=False).std() for _ in range(20)]
    assert max(mild) < 0.043 * 255
    assert min(strong) > 0.057 * 255


def test_noise_and_blur_by_hand(rng):
    image = np.full((48, 48, 3), 128, np.uint8)
    assert corrupt.noise(image, rng, 0.1).std() == pytest.approx(25.5, rel=0.05)
    np.testing.assert_array_equal(corrupt.blur(image, 1.0), image)
    step = np.zeros((48, 48, 3), np.uint8)
    step[:, 24:] = 200
    # a Gaussian edge: half a pixel from the step, sigma 1 -> 200 * Phi(0.5) of the sampled kernel
    assert corrupt.blur(step, 1.0)[20, 24, 0] == pytest.approx(200 * 0.6995, abs=2)


def test_erased_and_malformed_shapes_are_beyond_recognition(rng):
    for kind in ("erase", "warp"):
        for _ in range(15):
            scene = scenes.random_scene(rng)
            corruption = corrupt.corrupt(scene, rng, kind)
            assert not checker.exact_all(corruption.image, specs.describe(scene))


def test_erase_takes_a_third_to_two_thirds(rng):
    for _ in range(20):
        scene = scenes.random_scene(rng, 1)
        mask = scenes.object_masks(scene)[0]
        share = corrupt._erase(mask, scene.objects[0], rng).sum() / mask.sum()
        assert 0.28 < share < 0.72


def test_overlap_by_hand():
    a, b = np.zeros((2, 4)), np.zeros((2, 4))
    a[:, :2], b[:, 1:3] = 1.0, 0.5
    # shared: one column of 0.5s; union: two columns of 1 and one of 0.5
    assert corrupt.overlap(a, b) == pytest.approx(1.0 / 5.0)


def test_single_shapes_cannot_merge(rng):
    assert corrupt.corrupt(scenes.random_scene(rng, 1), rng, "merge").kind == "smear"


def test_unknown_kind(rng):
    with pytest.raises(ValueError, match="unknown kind 'rain'"):
        corrupt.corrupt(scenes.random_scene(rng), rng, "rain")
