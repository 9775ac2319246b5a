"""Builds pretraining batches: examples as fixed-size arrays of token ids and images.

Everything is numpy and runs in a helper process beside the device. Every batch depends on
(seed, step) alone, so that an interrupted pretraining continues with the data of an uninterrupted
one.

A row's texts follow one another without padding between them. Three masks describe each token:
`mask` (it exists), `scored` (the model must predict it), `visible` (the image drawn afterwards may
attend to it; guidance needs rows whose texts are hidden).
"""

import dataclasses
import functools

import numpy as np

from alphagrpo_jax import tasks
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes import corrupt, examples, scenes, specs

NO_SYSTEM, THINK_SYSTEM, ANSWER_SYSTEM = 0, 1, 2  # which system prompt precedes a row


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Rows of each kind in one batch, and the padded text lengths in tokens."""

    draw: int = 28  # think, then draw
    plan: int = 28  # think only; half are relations, which drawing examples alone teach slowly
    plain: int = 4  # draw without thinking
    reflect: int = 8  # name the flaws of an image and repair it
    edit: int = 12
    understand: int = 28  # captions and answers
    draw_tokens: int = 64
    reflect_tokens: int = 176
    short_tokens: int = 56  # edits, captions, answers
    mild: float = 0.3  # share of input images with mild flaws, as generated images have
    drop: float = 0.1  # share of rows whose texts are hidden from the drawing
    drop_think: float = 0.05  # share of rows whose think text alone is hidden


@dataclasses.dataclass(frozen=True)
class TextRow:
    """The texts of one row; the model must write those that `scored` marks."""

    texts: tuple[str, ...]
    scored: tuple[bool, ...]
    system: int  # `NO_SYSTEM`, `THINK_SYSTEM` or `ANSWER_SYSTEM`


def make_batch(tokenizer: Tokenizer, sizes: BatchSizes, seed: int, step: int) -> dict:
    """Samples one pretraining batch as a nested dict of arrays.

    Returns:
      `draw`, `plan`, `reflect`, `short`: texts, see `_encode`; `draw_image`:
      uint8[draw + plain, H, W, 3];
      `source`: uint8[reflect + edit + understand, H, W, 3], input images; `target`:
      uint8[reflect + edit, H, W, 3], images to produce; `words`: int32[reflect + edit +
      understand, M, 2], the two words for each patch of `source`, see `patch_words`.
    """
    # The order of the random calls is part of the data: keep it.
    rng = np.random.default_rng((seed, step))
    drawings = [examples.draw_example(rng) for _ in range(sizes.draw)]
    plain = [examples.draw_example(rng, implied_share=0.1) for _ in range(sizes.plain)]
    plans = [examples.plan_example(rng) for _ in range(sizes.plan)]
    repairs = [examples.reflect_example(rng) for _ in range(sizes.reflect)]
    edits = [examples.edit_example(rng) for _ in range(sizes.edit)]
    understand_scenes, understand_rows = zip(
        *[_understanding(index, rng) for index in range(sizes.understand)], strict=True
    )
    draw_rows = [_think_row(example.prompt, example.think) for example in drawings]
    draw_rows += [TextRow((example.prompt,), (False,), NO_SYSTEM) for example in plain]
    plan_rows = [_think_row(example.prompt, example.think) for example in plans]
    reflect_rows = [
        _think_row(tasks.GENERATE_REFLECTION_REQUEST.format(prompt=example.prompt), example.think)
        for example in repairs
    ]
    short_rows = [_think_row(example.instruction, example.think) for example in edits]
    short_rows += understand_rows
    sources = [*(example.scene for example in (*repairs, *edits)), *understand_scenes]
    return {
        "draw": _encode(tokenizer, draw_rows, sizes.draw_tokens, sizes, rng),
        "plan": _encode(tokenizer, plan_rows, sizes.draw_tokens, sizes, rng),
        "reflect": _encode(tokenizer, reflect_rows, sizes.reflect_tokens, sizes, rng),
        "short": _encode(tokenizer, short_rows, sizes.short_tokens, sizes, rng),
        "draw_image": _render([example.scene for example in (*drawings, *plain)]),
        "source": _render_inputs(sources, sizes, rng),
        "words": np.stack([patch_words(tokenizer, scene) for scene in sources]),
        "target": _render([example.target for example in (*repairs, *edits)]),
    }


def patch_words(tokenizer: Tokenizer, scene: scenes.Scene) -> np.ndarray:
    """Returns the words for the content of each grid cell: int32[9, 2], a noun's and a color's.

    An empty cell shows "background" in the background's color. Cells are in reading order, as the
    patches of the vision encoder are.

    Raises:
      ValueError: a word is not one token.
    """
    cells = [[("background", scene.background)] * scenes.GRID for _ in range(scenes.GRID)]
    for obj in scene.objects:
        cells[obj.row][obj.col] = (obj.shape, obj.color)
    ids = [[_token(tokenizer, word) for word in cell] for row in cells for cell in row]
    return np.array(ids, np.int32)


@functools.lru_cache(maxsize=64)
def _token(tokenizer: Tokenizer, word: str) -> int:
    ids = tokenizer.encode(f" {word}")
    if len(ids) != 1:
        raise ValueError(f"the tokenizer has {len(ids)} tokens for {word!r}, one is expected")
    return ids[0]


def _think_row(prompt: str, think: str) -> TextRow:
    return TextRow((prompt, think), (False, True), THINK_SYSTEM)


def _understanding(index: int, rng: np.random.Generator) -> tuple[scenes.Scene, TextRow]:
    if index % 2:
        example = examples.caption_example(rng)
        texts = (example.instruction, example.text)
        return example.scene, TextRow(texts, (False, True), NO_SYSTEM)
    example = examples.answer_example(rng)
    if index % 4 == 0:
        texts = (example.question, example.answer)
        return example.scene, TextRow(texts, (False, True), NO_SYSTEM)
    texts = (example.question, example.think, example.answer)
    return example.scene, TextRow(texts, (False, True, True), ANSWER_SYSTEM)


def _encode(
    tokenizer: Tokenizer,
    rows: list[TextRow],
    length: int,
    sizes: BatchSizes,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Encodes rows: tokens int32[B, T]; mask, scored, visible bool[B, T]; system int32[B].

    Raises:
      ValueError: a row does not fit into `length` tokens.
    """
    special = tokenizer.special
    shape = (len(rows), length)
    tokens = np.full(shape, tokenizer.pad, np.int32)
    mask, scored, visible = (np.zeros(shape, bool) for _ in range(3))
    for i, row in enumerate(rows):
        hide, hide_think = rng.random() < sizes.drop, rng.random() < sizes.drop_think
        begin = 0
        for text, is_scored in zip(row.texts, row.scored, strict=True):
            ids = [special.im_start, *tokenizer.encode(text), special.im_end]
            end = begin + len(ids)
            if end > length:
                raise ValueError(
                    f"a pretraining row has at least {end} tokens, its bucket holds {length}: "
                    f"{row.texts}; enlarge the field of BatchSizes"
                )
            tokens[i, begin:end] = ids
            mask[i, begin:end] = True
            scored[i, begin + 1 : end] = is_scored
            visible[i, begin:end] = not (hide or (is_scored and hide_think))
            begin = end
    system = np.array([row.system for row in rows], np.int32)
    return {
        "tokens": tokens,
        "mask": mask,
        "scored": scored,
        "visible": visible,
        "system": system,
    }


def _render_inputs(
    sources: list[scenes.Scene], sizes: BatchSizes, rng: np.random.Generator
) -> np.ndarray:
    images = _render(sources)
    for i in np.flatnonzero(rng.random(len(images)) < sizes.mild):
        kind = str(specs.pick(rng, corrupt.PHOTOMETRIC))
        images[i] = corrupt.photometric(images[i], rng, kind, mild=True)
    return images


def _render(batch: list[scenes.Scene]) -> np.ndarray:
    return np.stack([scenes.render(scene, supersample=3) for scene in batch])
