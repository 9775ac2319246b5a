"""Training data of the small verifier: images, dense labels, and questions with answers.

The truth comes from the scene that was rendered and from the damage that was done to the picture
(`corrupt.py`); the exact checker has no part in it.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alphagrpo_jax.rewards.verifiers.instructions import (
    AUDIT_INSTRUCTION,
    RATE_INSTRUCTION,
    RATE_PROMPT,
    RATE_QUALITY,
)
from alphagrpo_jax.shapes import corrupt, examples, language, questions, scenes
from alphagrpo_jax.shapes.pretraining.verifier_model import (
    ASSISTANT,
    IMAGE,
    PATCH,
    PATCHES,
    SYSTEM,
    USER,
)
from alphagrpo_jax.shapes.specs import COLORS, describe, facts, pick

SUBJECTS = 2  # nouns of a question that its last state is trained to know
CELLS = scenes.GRID * scenes.GRID
IGNORE = -100  # torch's ignored class index
NO_SHAPE, NO_COLOR = len(scenes.SHAPES), len(COLORS)
# What is read off each patch: classes of shape, colour, background, row and column, then the
# faults (geometry, coherence, texture), then how much was changed there.
PATCH_OUTPUTS = (NO_SHAPE + 1, NO_COLOR + 1, 3, scenes.GRID, scenes.GRID, 3, 1)
BACKGROUNDS = tuple(scenes.BACKGROUNDS)
NOUNS = {
    form: shape
    for shape in (*scenes.SHAPES, "shape")
    for form in (shape, f"{shape}s", f"{shape}es")
}
SOFT = ("noise", "soft", "bleed", "blotch")  # pairs of mild ones are still sound
# Groups of damage, equally likely each; the kinds of a group are equally likely too.
DAMAGE = (corrupt.STRUCTURAL, corrupt.PHOTOMETRIC, corrupt.SURFACE)
# Cumulative shares of images; the rest is damaged.
ODD_SHARE, CLEAN_SHARE, SOFT_SHARE = 0.05, 0.20, 0.30
SHARES = {
    "existence": 0.10,
    "attribute": 0.17,
    "count": 0.18,
    "relation": 0.28,
    "background": 0.05,
    "geometry": 0.08,
    "coherence": 0.08,
    "texture": 0.06,
}


LabeledQuestion = tuple[str, str, str]  # question, answer word, type


@dataclasses.dataclass(frozen=True)
class LabeledImage:
    """One image with everything that is known about it."""

    image: np.ndarray  # uint8[48, 48, 3]
    scene: scenes.Scene
    labels: Mapping[str, bool]  # by quality type; what damage leaves open is absent
    damaged: tuple[int, ...]  # indexes of shapes that cannot be recognised for sure
    meant: scenes.Scene  # what questions are picked from; mostly the scene itself
    faulty: tuple[int, ...] = ()  # indexes of shapes in whose cells the faults are to be seen


@dataclasses.dataclass(frozen=True)
class VerifierBatch:
    """Tensors of N images with Q questions of at most T tokens each."""

    pixels: Tensor  # float32[N, 3, 48, 48] in [-1, 1]
    shape: Tensor  # int64[N, 36] per patch
    color: Tensor  # int64[N, 36] per patch
    background: Tensor  # int64[N]
    quality: Tensor  # float32[N, 3], NaN where unknown
    faults: Tensor  # float32[N, 36, 3] per patch, NaN where unknown
    change: Tensor  # float32[N, 36] log of the root mean square change by damage
    tokens: Tensor  # int64[N, Q, T]
    ends: Tensor  # int64[N, Q] index of the last token
    answers: Tensor  # int64[N, Q] token ids
    nouns: Tensor  # int64[M] flat indexes into N Q T
    cells: Tensor  # float32[M, 9] which cells the noun's phrase names
    subjects: Tensor  # float32[N, Q, 2, 9] the same for the first two nouns, NaN where unknown


def prefix(instruction: str) -> str:
    """The rendered chat up to and including the image, before the question."""
    return f"{SYSTEM}{instruction}{USER}{IMAGE}"


def vocabulary(seed: int = 0, draws: int = 2000) -> set[str]:
    """All words of questions, prompts and instructions."""
    rng = np.random.default_rng(seed)
    texts = [AUDIT_INSTRUCTION, RATE_INSTRUCTION, RATE_PROMPT, RATE_QUALITY]
    sound = dict.fromkeys(questions.QUALITY, True)
    for _ in range(draws):
        scene = examples.train_scene(rng)
        texts += [asked[0] for asked in questions.sample_questions(scene, sound, rng, 8)]
        texts.append(examples.draw_example(rng).prompt)
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8[N, 48, 48, 3] -> float32[N, 3, 48, 48] in [-1, 1], as the processor does it."""
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return values / 127.5 - 1


def dense_labels(example: LabeledImage) -> tuple[np.ndarray, np.ndarray]:
    """Shape and colour class of the cell that each patch lies in, int64[36] each."""
    shape = np.full((scenes.GRID, scenes.GRID), NO_SHAPE)
    color = np.full((scenes.GRID, scenes.GRID), NO_COLOR)
    for index, thing in enumerate(example.scene.objects):
        known = index not in example.damaged
        shape[thing.row, thing.col] = scenes.SHAPES.index(thing.shape) if known else IGNORE
        color[thing.row, thing.col] = COLORS.index(thing.color) if known else IGNORE
    each = PATCHES // scenes.GRID
    return tuple(np.kron(x, np.ones((each, each), np.int64)).reshape(-1) for x in (shape, color))


def dense_faults(example: LabeledImage) -> np.ndarray:
    """float32[36, 3]: whether a patch shows each fault; NaN where that is not known.

    A sound image has none anywhere; of a damaged one only a faulty shape's cell is known.
    """
    faults = np.full((scenes.GRID, scenes.GRID, len(questions.QUALITY)), np.nan, np.float32)
    for index, type_ in enumerate(questions.QUALITY):
        if example.labels.get(type_, False):
            faults[..., index] = 0
        elif type_ in example.labels and example.faulty:
            # Of two merged shapes the second is where it was; see `corrupt.corrupt`.
            thing = example.scene.objects[example.faulty[-1]]
            faults[thing.row, thing.col, index] = 1
    each = PATCHES // scenes.GRID
    return faults.repeat(each, 0).repeat(each, 1).reshape(-1, len(questions.QUALITY))


def dense_change(example: LabeledImage) -> np.ndarray:
    """float32[36]: log(0.01 + root mean square change of a patch, in a range of 2)."""
    change = (example.image - scenes.render(example.scene).astype(np.float32)) / 127.5
    squares = (change**2).reshape(PATCHES, PATCH, PATCHES, PATCH, 3).mean((1, 3, 4))
    return np.log(0.01 + np.sqrt(squares)).reshape(-1).astype(np.float32)


@functools.lru_cache
def patch_cells() -> tuple[Tensor, Tensor]:
    """Grid row and column of each patch, int64[36] each."""
    places = torch.arange(PATCHES) * scenes.GRID // PATCHES
    return places.repeat_interleave(PATCHES), places.repeat(PATCHES)


@functools.lru_cache(maxsize=100_000)
def noun_phrases(question: str) -> tuple[tuple[int, str, str | None], ...]:
    """(word index, shape or "shape", colour or None) of each noun in a question."""
    words = re.findall(r"\w+|[^\w\s]", question.lower())
    return tuple(
        (i, NOUNS[word], words[i - 1] if i and words[i - 1] in COLORS else None)
        for i, word in enumerate(words)
        if word in NOUNS
    )


def named_cells(example: LabeledImage, shape: str, color: str | None) -> np.ndarray | None:
    """float32[9] marking the cells of the shapes named; None if damage makes that unsure."""
    marked = np.zeros(CELLS, np.float32)
    for index, thing in enumerate(example.scene.objects):
        if shape in ("shape", thing.shape) and color in (None, thing.color):
            if index in example.damaged:
                return None
            marked[thing.row * scenes.GRID + thing.col] = 1
    return marked


class BatchEncoder:
    """Turns examples and their questions into batches for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}

    def prefix(self, instruction: str) -> Tensor:
        """Token ids int64[S] of a prefix, with one image token per patch."""
        text = prefix(instruction).replace(IMAGE, IMAGE * PATCHES * PATCHES)
        return torch.tensor(self.tokenizer(text)["input_ids"])

    def question(self, text: str) -> list[int]:
        """Token ids of a question up to where the answer begins."""
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text + ASSISTANT)["input_ids"]
        return self.ids[text]

    def batch(
        self, batch: Sequence[LabeledImage], asked: Sequence[Sequence[LabeledQuestion]]
    ) -> VerifierBatch:
        """Stacks examples and their questions, equally many for each."""
        encoded = [[self.question(text) for text, *_ in pairs] for pairs in asked]
        longest = max((len(ids) for row in encoded for ids in row), default=0)
        tokens = np.full((len(batch), len(asked[0]), longest), self.tokenizer.pad_token_id)
        subjects = np.full((*tokens.shape[:2], SUBJECTS, CELLS), np.nan, np.float32)
        nouns, cells = [], []
        for n, pairs in enumerate(asked):
            for q, (text, *_) in enumerate(pairs):
                tokens[n, q, : len(encoded[n][q])] = encoded[n][q]
                for index, (position, shape, color) in enumerate(noun_phrases(text)):
                    marked = named_cells(batch[n], shape, color)
                    if marked is not None:
                        if index < SUBJECTS:
                            subjects[n, q, index] = marked
                        nouns.append((n * len(pairs) + q) * longest + position)
                        cells.append(marked)
        words = [[self.tokenizer.convert_tokens_to_ids(w) for _, w, *_ in pairs] for pairs in asked]
        ends = [[len(ids) - 1 for ids in row] for row in encoded]
        shape, color = zip(*(dense_labels(example) for example in batch), strict=True)
        return VerifierBatch(
            pixels=pixels([example.image for example in batch]),
            shape=torch.from_numpy(np.stack(shape)),
            color=torch.from_numpy(np.stack(color)),
            background=torch.tensor([BACKGROUNDS.index(e.scene.background) for e in batch]),
            quality=torch.tensor(
                [[float(e.labels.get(q, np.nan)) for q in questions.QUALITY] for e in batch]
            ),
            faults=torch.from_numpy(np.stack([dense_faults(e) for e in batch])),
            change=torch.from_numpy(np.stack([dense_change(e) for e in batch])),
            tokens=torch.from_numpy(tokens),
            ends=torch.tensor(ends),
            answers=torch.tensor(words),
            nouns=torch.tensor(nouns, dtype=torch.int64),
            cells=torch.from_numpy(np.stack(cells)) if cells else torch.zeros(0, CELLS),
            subjects=torch.from_numpy(subjects),
        )


def _odd(rng: np.random.Generator) -> tuple[scenes.Scene, scenes.Scene]:
    """A scene of no or four shapes, and one of one to three that it is mistaken for."""
    if rng.random() < 0.25:
        meant = examples.train_scene(rng)
        return dataclasses.replace(meant, objects=()), meant
    scene = scenes.random_scene(rng, scenes.MAX_OBJECTS + 1)
    return scene, dataclasses.replace(scene, objects=scene.objects[: scenes.MAX_OBJECTS])


def sample_labeled_image(rng: np.random.Generator) -> LabeledImage:
    """A training image: clean, softly imperfect, damaged, or of an unusual number of shapes.

    Scenes of one to three shapes have combinations of the train split.
    """
    form = rng.random()
    if form < ODD_SHARE:
        scene, meant = _odd(rng)
        return LabeledImage(scenes.render(scene), scene, corrupt.SOUND, (), meant)
    scene = examples.train_scene(rng)
    if form < CLEAN_SHARE:
        return LabeledImage(scenes.render(scene), scene, corrupt.SOUND, (), scene)
    if form < SOFT_SHARE:
        first, second = rng.permutation(len(SOFT))[:2]
        image = corrupt.photometric(scenes.render(scene), rng, SOFT[first], mild=True)
        image = corrupt.photometric(image, rng, SOFT[second], mild=True)
        return LabeledImage(image, scene, corrupt.SOUND, (), scene)
    result = corrupt.corrupt(scene, rng, pick(rng, pick(rng, DAMAGE)))
    return LabeledImage(result.image, scene, result.labels, result.damaged, scene, result.faulty)


def questions_about(
    example: LabeledImage, rng: np.random.Generator, count: int
) -> list[LabeledQuestion]:
    """`count` (question, "yes" or "no", type) triples; relations are asked about more often.

    What is asked about is picked from the scene that was meant.
    """
    meant, scene = example.meant, example.scene
    kept = [thing for i, thing in enumerate(scene.objects) if i not in example.damaged]
    without = dataclasses.replace(scene, objects=tuple(kept))
    types = [t for t in questions.TYPES if t in questions.SEMANTIC or t in example.labels]
    shares = np.array([SHARES[t] for t in types])
    if len(meant.objects) == 1:  # relations of a single shape never hold
        shares[types.index("relation")] *= 0.15
    found: dict[str, LabeledQuestion] = {}
    spare, balance = [], dict.fromkeys(types, 0)
    for type_ in rng.choice(types, 3 * count, p=shares / shares.sum()):
        query = questions.sample_query(meant, type_, rng)
        answer = questions.truth(query, scene, example.labels)
        if answer != questions.truth(query, without, example.labels):
            continue  # depends on whether a damaged shape still counts
        excess = balance[type_] if answer else -balance[type_]  # yes minus no, so far
        if excess > 1 and type_ in questions.SEMANTIC:
            continue
        text = questions.text(query, int(rng.integers(len(questions.WORDINGS[query.form]))))
        triple = (text, "yes" if answer else "no", query.type)
        balance[type_] += 1 if answer else -1
        if text in found:
            spare.append(triple)  # few different questions exist about some scenes
        found.setdefault(text, triple)
        if len(found) == count:
            break
    return [*found.values(), *spare, *found.values()][:count]


def ratings_about(example: LabeledImage, rng: np.random.Generator) -> list[LabeledQuestion]:
    """Three prompts, each rated by the share of its facts that hold, and the image's quality.

    Ratings are the words "0" to "10".
    """
    triples = []
    for index in range(3):
        other = examples.train_scene(rng)
        if index < 2 and example.scene.objects:  # right, or right in part
            kept = example.scene.objects[: int(rng.integers(1, 4))]
            background = pick(rng, (example.scene.background, other.background))
            things = kept if index == 0 else (kept + other.objects)[: scenes.MAX_OBJECTS]
            other = scenes.Scene(things, background)
        spec = describe(other)
        if rng.random() < 0.5:
            spec = dataclasses.replace(spec, background=other.background)
        truths = facts(spec, example.scene.objects, example.scene.background)
        prompt = language.prompt(spec, ({},) * len(spec.groups), rng)
        rating = round(10 * float(np.mean(list(truths.values()))))
        triples.append((RATE_PROMPT.format(prompt=prompt), str(rating), "match"))
    # Each fault costs four points; an open label costs none.
    faults = sum(not sound for sound in example.labels.values())
    triples.append((RATE_QUALITY, str(max(0, 10 - 4 * faults)), "drawing"))
    return triples
