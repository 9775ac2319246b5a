"""Pretraining batches of the shapes world: examples as fixed-size arrays of token ids and images.

All of it is numpy and runs in a helper process beside the device. Every batch is a function of
(seed, step) alone, so that an interrupted pretraining continues with the data it would have seen.

A row's texts follow one another without padding between them. Three masks say what each token is
for: `mask` (it exists), `scored` (the model must predict it), `visible` (the image that is drawn
afterwards may look at it; hiding texts at times is what makes guidance possible).
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
    plan: int = 28  # think only, half of them about relations, which drawings alone learn slowly
    plain: int = 4  # draw without thinking
    reflect: int = 8  # say what is wrong with an image and repair it
    edit: int = 12
    understand: int = 28  # captions and answers
    draw_tokens: int = 64
    reflect_tokens: int = 176
    short_tokens: int = 56  # edits, captions, answers
    mild: float = 0.3  # share of images to look at with mild flaws, as drawn ones have
    drop: float = 0.1  # share of rows whose texts are hidden from the drawing
    drop_think: float = 0.05  # share of rows whose think text alone is hidden


@dataclasses.dataclass(frozen=True)
class TextRow:
    """The texts of one row; `scored` says which of them the model must write itself."""

    texts: tuple[str, ...]
    scored: tuple[bool, ...]
    system: int


def make_batch(tokenizer: Tokenizer, sizes: BatchSizes, seed: int, step: int) -> dict:
    """One pretraining batch as a nested dict of arrays.

    Returns:
      `draw`, `plan`, `reflect`, `short`: texts, see `_texts`; `draw_image`:
      uint8[draw + plain, H, W, 3];
      `source`: uint8[reflect + edit + understand, H, W, 3], images to look at; `target`:
      uint8[reflect + edit, H, W, 3], images to arrive at; `words`: int32[reflect + edit +
      understand, M, 2], the two words for each patch of `source`, see `patch_words`.
    """
    rng = np.random.default_rng((seed, step))
    drawings = [examples.draw_example(rng) for _ in range(sizes.draw)]
    plain = [examples.draw_example(rng, implied_share=0.1) for _ in range(sizes.plain)]
    plans = [examples.plan_example(rng) for _ in range(sizes.plan)]
    repairs = [examples.reflect_example(rng) for _ in range(sizes.reflect)]
    edits = [examples.edit_example(rng) for _ in range(sizes.edit)]
    looked_at, answers = zip(
        *[_understanding(row, rng) for row in range(sizes.understand)], strict=True
    )
    draw_rows = [TextRow((e.prompt, e.think), (False, True), THINK_SYSTEM) for e in drawings]
    draw_rows += [TextRow((e.prompt,), (False,), NO_SYSTEM) for e in plain]
    plan_rows = [TextRow((e.prompt, e.think), (False, True), THINK_SYSTEM) for e in plans]
    reflect_rows = [
        TextRow(
            (tasks.REFLECTION_REQUEST.format(prompt=e.prompt), e.think),
            (False, True),
            THINK_SYSTEM,
        )
        for e in repairs
    ]
    edit_rows = [TextRow((e.instruction, e.think), (False, True), THINK_SYSTEM) for e in edits]
    sources = [*(e.scene for e in (*repairs, *edits)), *looked_at]
    return {
        "draw": _texts(tokenizer, draw_rows, sizes.draw_tokens, sizes, rng),
        "plan": _texts(tokenizer, plan_rows, sizes.draw_tokens, sizes, rng),
        "reflect": _texts(tokenizer, reflect_rows, sizes.reflect_tokens, sizes, rng),
        "short": _texts(tokenizer, edit_rows + list(answers), sizes.short_tokens, sizes, rng),
        "draw_image": _images([e.scene for e in (*drawings, *plain)]),
        "source": _seen(sources, sizes, rng),
        "words": np.stack([patch_words(tokenizer, scene) for scene in sources]),
        "target": _images([e.target for e in (*repairs, *edits)]),
    }


def patch_words(tokenizer: Tokenizer, scene: scenes.Scene) -> np.ndarray:
    """What is to be seen in each grid cell: int32[9, 2], tokens of a noun and of a colour.

    An empty cell shows "background" in the background's colour. Cells in reading order, as the
    patches of the vision encoder are.

    Raises:
      ValueError: a word is not one token.
    """
    cells = [[("background", scene.background)] * scenes.GRID for _ in range(scenes.GRID)]
    for thing in scene.objects:
        cells[thing.row][thing.col] = (thing.shape, thing.color)
    ids = [[_token(tokenizer, w) for w in cell] for row in cells for cell in row]
    return np.array(ids, np.int32)


@functools.lru_cache(maxsize=64)
def _token(tokenizer: Tokenizer, word: str) -> int:
    ids = tokenizer.encode(f" {word}")
    if len(ids) != 1:
        raise ValueError(f"the tokenizer has {len(ids)} tokens for {word!r}, one is expected")
    return ids[0]


def _understanding(row: int, rng: np.random.Generator) -> tuple[scenes.Scene, TextRow]:
    if row % 2:
        example = examples.caption_example(rng)
        texts = (example.instruction, example.text)
        return example.scene, TextRow(texts, (False, True), NO_SYSTEM)
    example = examples.answer_example(rng)
    if row % 4 == 0:
        texts = (example.question, example.answer)
        return example.scene, TextRow(texts, (False, True), NO_SYSTEM)
    texts = (example.question, example.think, example.answer)
    return example.scene, TextRow(texts, (False, True, True), ANSWER_SYSTEM)


def _texts(
    tokenizer: Tokenizer,
    rows: list[TextRow],
    length: int,
    sizes: BatchSizes,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Rows as arrays: tokens int32[B, T]; mask, scored, visible bool[B, T]; system int32[B].

    Raises:
      ValueError: a row does not fit into `length` tokens.
    """
    special = tokenizer.special
    shape = (len(rows), length)
    tokens = np.full(shape, tokenizer.pad, np.int32)
    mask, scored, visible = (np.zeros(shape, bool) for _ in range(3))
    for i, row in enumerate(rows):
        hide, hide_think = rng.random() < sizes.drop, rng.random() < sizes.drop_think
        at = 0
        for text, own in zip(row.texts, row.scored, strict=True):
            ids = [special.im_start, *tokenizer.encode(text), special.im_end]
            end = at + len(ids)
            if end > length:
                raise ValueError(
                    f"a pretraining row has at least {end} tokens, its bucket holds {length}: "
                    f"{row.texts}; enlarge the field of BatchSizes"
                )
            tokens[i, at:end] = ids
            mask[i, at:end] = True
            scored[i, at + 1 : end] = own
            visible[i, at:end] = not (hide or (own and hide_think))
            at = end
    system = np.array([row.system for row in rows], np.int32)
    return {
        "tokens": tokens,
        "mask": mask,
        "scored": scored,
        "visible": visible,
        "system": system,
    }


def _seen(looked_at: list[scenes.Scene], sizes: BatchSizes, rng: np.random.Generator) -> np.ndarray:
    images = _images(looked_at)
    for i in np.flatnonzero(rng.random(len(images)) < sizes.mild):
        kind = str(specs.pick(rng, corrupt.PHOTOMETRIC))
        images[i] = corrupt.photometric(images[i], rng, kind, mild=True)
    return images


def _images(drawn: list[scenes.Scene]) -> np.ndarray:
    return np.stack([scenes.render(scene, supersample=3) for scene in drawn])
