"""The renderer: known areas, colors and boxes."""

import numpy as np
import pytest

from alphagrpo_jax.shapes import scenes


@pytest.mark.parametrize(
    ("shape", "area"),
    # circle pi 6^2; square (2 * 5.4)^2; triangle 12 * 12 / 2; cross two bars of 12 x 4
    [("circle", 113.10), ("square", 116.64), ("triangle", 72.0), ("cross", 80.0)],
)
def test_areas(shape, area):
    scene = scenes.Scene((scenes.SceneObject(shape, "red", 1, 1, 0.3, -0.7),), "white")
    masks = scenes.object_masks(scene, supersample=16)
    assert masks.shape == (1, 48, 48)
    assert masks.sum() == pytest.approx(area, rel=0.01)


def test_centers_and_cells():
    obj = scenes.SceneObject("square", "blue", 2, 0, 1.0, -1.5)
    assert obj.center == (9.0, 38.5)
    mask = scenes.object_masks(scenes.Scene((obj,), "gray"), supersample=8)[0]
    points = np.arange(48) + 0.5
    center = (mask @ points).sum() / mask.sum(), (mask.T @ points).sum() / mask.sum()
    np.testing.assert_allclose(center, (9.0, 38.5), atol=0.05)


def test_render_colors():
    obj = scenes.SceneObject("circle", "orange", 0, 2)
    image = scenes.render(scenes.Scene((obj,), "black"))
    assert image.dtype == np.uint8
    assert image.shape == (48, 48, 3)
    assert tuple(image[8, 40]) == scenes.COLORS["orange"]
    assert tuple(image[30, 10]) == scenes.BACKGROUNDS["black"]


def test_larger_resolution_is_the_same_picture():
    scene = scenes.random_scene(np.random.default_rng(3), 3)
    small = scenes.render(scene, supersample=8).astype(float)
    large = scenes.render(scene, resolution=96, supersample=4).astype(float)
    pooled = large.reshape(48, 2, 48, 2, 3).mean((1, 3))
    np.testing.assert_allclose(pooled, small, atol=1.0)


def test_shapes_stay_within_their_cells():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = scenes.random_scene(rng)
        for mask, obj in zip(scenes.object_masks(scene), scene.objects, strict=True):
            mask[obj.row * 16 : obj.row * 16 + 16, obj.col * 16 : obj.col * 16 + 16] = 0
            assert mask.sum() == 0


def test_unknown_shape():
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        scenes.coverage("star", np.zeros(1), np.zeros(1))
