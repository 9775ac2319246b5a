import io

import numpy as np
import pytest
from PIL import Image

from alphagrpo_jax.rewards.verifiers import png


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (40, 56)])
@pytest.mark.parametrize("kind", ["noise", "flat", "slope"])
def test_pillow_reads_the_very_pixels(shape, kind):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    slope = np.cumsum(np.full((*shape, 3), 7, np.uint8), axis=0, dtype=np.uint8)
    image = {"noise": noise, "flat": np.full_like(noise, 200), "slope": slope}[kind]
    with Image.open(io.BytesIO(png.encode(image))) as file:
        file.load()
        assert (file.format, file.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(file), image)
    strided = np.stack([image, image], axis=1)[:, 0]  # not contiguous
    assert png.encode(strided) == png.encode(image)
