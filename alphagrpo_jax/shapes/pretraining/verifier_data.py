"""Samples training data of the small verifier: images, dense labels, and questions with answers.

Labels come from the rendered scene and from the damage to the image (`corrupt.py`); the exact
checker is not involved.
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

SUBJECTS = 2  # nouns of a question whose cells its last state is trained to predict
CELLS = scenes.GRID * scenes.GRID
IGNORE = -100  # torch's ignored class index
CELL_PATCHES = PATCHES // scenes.GRID  # per side of a grid cell
NO_SHAPE, NO_COLOR = len(scenes.SHAPES), len(COLORS)
# Outputs per patch: classes of shape, color, background, row and column, then the faults (geometry,
# coherence, texture), then the size of the change by damage.
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
# Cumulative shares of images; the remaining ones are damaged.
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
    """One image with all its labels."""

    image: np.ndarray  # uint8[48, 48, 3]
    scene: scenes.Scene
    labels: Mapping[str, bool]  # by quality type; absent where damage leaves it open
    damaged: tuple[int, ...]  # indexes of objects beyond sure recognition
    question_scene: scenes.Scene  # questions are sampled from it; mostly the scene itself
    faulty: tuple[int, ...] = ()  # indexes of objects whose cells show the faults


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
    cells: Tensor  # float32[M, 9] marks the cells that the noun's phrase names
    subjects: Tensor  # float32[N, Q, 2, 9] cells of the first two nouns, NaN where unknown


def prefix(instruction: str) -> str:
    """Renders the chat up to and including the image, before the question."""
    return f"{SYSTEM}{instruction}{USER}{IMAGE}"


def vocabulary(seed: int = 0, draws: int = 2000) -> set[str]:
    """Collects the words of questions, prompts and instructions from `draws` random scenes."""
    rng = np.random.default_rng(seed)
    texts = [AUDIT_INSTRUCTION, RATE_INSTRUCTION, RATE_PROMPT, RATE_QUALITY]
    sound: dict[str, bool] = dict.fromkeys(questions.QUALITY, True)
    for _ in range(draws):
        scene = examples.train_scene(rng)
        texts += [text for text, *_ in questions.sample_questions(scene, sound, rng, 8)]
        texts.append(examples.draw_example(rng).prompt)
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """Maps uint8[N, 48, 48, 3] to float32[N, 3, 48, 48] in [-1, 1], as the processor does."""
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return values / 127.5 - 1


def dense_labels(example: LabeledImage) -> tuple[np.ndarray, np.ndarray]:
    """Returns shape and color class of the cell that each patch lies in, int64[36] each."""
    shape = np.full((scenes.GRID, scenes.GRID), NO_SHAPE)
    color = np.full((scenes.GRID, scenes.GRID), NO_COLOR)
    for index, obj in enumerate(example.scene.objects):
        intact = index not in example.damaged
        shape[obj.row, obj.col] = scenes.SHAPES.index(obj.shape) if intact else IGNORE
        color[obj.row, obj.col] = COLORS.index(obj.color) if intact else IGNORE
    return _per_patch(shape), _per_patch(color)


def _per_patch(cells: np.ndarray) -> np.ndarray:
    """Repeats int64[3, 3] per cell to int64[36] per patch."""
    return np.kron(cells, np.ones((CELL_PATCHES, CELL_PATCHES), np.int64)).reshape(-1)


def dense_faults(example: LabeledImage) -> np.ndarray:
    """Marks the faults that each patch shows: float32[36, 3], NaN where unknown.

    A sound image has no fault in any patch; of a damaged one only a faulty object's cell is known.
    """
    faults = np.full((scenes.GRID, scenes.GRID, len(questions.QUALITY)), np.nan, np.float32)
    for index, type_ in enumerate(questions.QUALITY):
        if example.labels.get(type_, False):
            faults[..., index] = 0
        elif type_ in example.labels and example.faulty:
            # Of two merged objects only the second is still in its cell; see `corrupt._merge`.
            obj = example.scene.objects[example.faulty[-1]]
            faults[obj.row, obj.col, index] = 1
    per_patch = faults.repeat(CELL_PATCHES, 0).repeat(CELL_PATCHES, 1)
    return per_patch.reshape(-1, len(questions.QUALITY))


def dense_change(example: LabeledImage) -> np.ndarray:
    """Computes log(0.01 + root mean square change of a patch, in a range of 2): float32[36]."""
    change = (example.image - scenes.render(example.scene).astype(np.float32)) / 127.5
    squares = (change**2).reshape(PATCHES, PATCH, PATCHES, PATCH, 3).mean((1, 3, 4))
    return np.log(0.01 + np.sqrt(squares)).reshape(-1).astype(np.float32)


@functools.lru_cache
def patch_cells() -> tuple[Tensor, Tensor]:
    """Returns grid row and column of each patch, int64[36] each."""
    cells = torch.arange(PATCHES) * scenes.GRID // PATCHES
    return cells.repeat_interleave(PATCHES), cells.repeat(PATCHES)


@functools.lru_cache(maxsize=100_000)
def noun_phrases(question: str) -> tuple[tuple[int, str, str | None], ...]:
    """Finds (word index, shape or "shape", color or None) of each noun in a question."""
    words = re.findall(r"\w+|[^\w\s]", question.lower())
    return tuple(
        (i, NOUNS[word], words[i - 1] if i and words[i - 1] in COLORS else None)
        for i, word in enumerate(words)
        if word in NOUNS
    )


def named_cells(example: LabeledImage, shape: str, color: str | None) -> np.ndarray | None:
    """Marks the cells of the named objects: float32[9]; None if damage makes that unsure."""
    marked = np.zeros(CELLS, np.float32)
    for index, obj in enumerate(example.scene.objects):
        if shape in ("shape", obj.shape) and color in (None, obj.color):
            if index in example.damaged:
                return None
            marked[obj.row * scenes.GRID + obj.col] = 1
    return marked


class BatchEncoder:
    """Encodes labeled images and their questions as batches for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}

    def prefix(self, instruction: str) -> Tensor:
        """Encodes a prefix, with one image token per patch: int64[S]."""
        text = prefix(instruction).replace(IMAGE, IMAGE * PATCHES * PATCHES)
        return torch.tensor(self.tokenizer(text)["input_ids"])

    def question(self, text: str) -> list[int]:
        """Encodes a question up to the assistant's token, behind which the answer begins."""
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text + ASSISTANT)["input_ids"]
        return self.ids[text]

    def batch(
        self, examples: Sequence[LabeledImage], asked: Sequence[Sequence[LabeledQuestion]]
    ) -> VerifierBatch:
        """Stacks N examples and their questions, equally many for each."""
        pad = self.tokenizer.pad_token_id
        encoded = [[self.question(text) for text, *_ in triples] for triples in asked]
        longest = max((len(ids) for row in encoded for ids in row), default=0)
        tokens = np.full((len(examples), len(asked[0]), longest), pad)
        subjects = np.full((*tokens.shape[:2], SUBJECTS, CELLS), np.nan, np.float32)
        nouns, cells = [], []
        for n, (example, triples) in enumerate(zip(examples, asked, strict=True)):
            for q, (text, *_) in enumerate(triples):
                tokens[n, q, : len(encoded[n][q])] = encoded[n][q]
                for index, (position, shape, color) in enumerate(noun_phrases(text)):
                    marked = named_cells(example, shape, color)
                    if marked is not None:
                        if index < SUBJECTS:
                            subjects[n, q, index] = marked
                        nouns.append((n * len(triples) + q) * longest + position)
                        cells.append(marked)
        to_id = self.tokenizer.convert_tokens_to_ids
        answers = [[to_id(answer) for _, answer, _ in triples] for triples in asked]
        ends = [[len(ids) - 1 for ids in row] for row in encoded]
        return VerifierBatch(
            **_image_labels(examples),
            tokens=torch.from_numpy(tokens),
            ends=torch.tensor(ends),
            answers=torch.tensor(answers),
            nouns=torch.tensor(nouns, dtype=torch.int64),
            cells=torch.from_numpy(np.stack(cells)) if cells else torch.zeros(0, CELLS),
            subjects=torch.from_numpy(subjects),
        )


def _image_labels(examples: Sequence[LabeledImage]) -> dict[str, Tensor]:
    """Stacks the fields of `VerifierBatch` that do not depend on questions."""
    shape, color = zip(*(dense_labels(example) for example in examples), strict=True)
    backgrounds = [BACKGROUNDS.index(example.scene.background) for example in examples]
    quality = [
        [float(example.labels.get(type_, np.nan)) for type_ in questions.QUALITY]
        for example in examples
    ]
    return {
        "pixels": pixels([example.image for example in examples]),
        "shape": torch.from_numpy(np.stack(shape)),
        "color": torch.from_numpy(np.stack(color)),
        "background": torch.tensor(backgrounds),
        "quality": torch.tensor(quality),
        "faults": torch.from_numpy(np.stack([dense_faults(example) for example in examples])),
        "change": torch.from_numpy(np.stack([dense_change(example) for example in examples])),
    }


def _odd(rng: np.random.Generator) -> tuple[scenes.Scene, scenes.Scene]:
    """Samples a scene of no or four objects, and the one of one to three to ask about."""
    if rng.random() < 0.25:
        question_scene = examples.train_scene(rng)
        return dataclasses.replace(question_scene, objects=()), question_scene
    scene = scenes.random_scene(rng, scenes.MAX_OBJECTS + 1)
    return scene, dataclasses.replace(scene, objects=scene.objects[: scenes.MAX_OBJECTS])


def sample_labeled_image(rng: np.random.Generator) -> LabeledImage:
    """Samples a training image: clean, softly imperfect, damaged, or of no or four objects.

    Scenes of one to three objects have combinations of the train split.
    """
    form = rng.random()
    if form < ODD_SHARE:
        scene, question_scene = _odd(rng)
        return LabeledImage(scenes.render(scene), scene, corrupt.SOUND, (), question_scene)
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
    """Samples `count` (question, "yes" or "no", type) triples, many of them about relations.

    Few different questions exist about some scenes: repetitions fill up the list at its end.
    """
    scene = example.scene
    intact = [obj for i, obj in enumerate(scene.objects) if i not in example.damaged]
    without_damaged = dataclasses.replace(scene, objects=tuple(intact))
    types = [t for t in questions.TYPES if t in questions.SEMANTIC or t in example.labels]
    shares = np.array([SHARES[t] for t in types])
    if len(example.question_scene.objects) == 1:  # relations of a single object never hold
        shares[types.index("relation")] *= 0.15
    different: dict[str, LabeledQuestion] = {}
    repeated, balance = [], dict.fromkeys(types, 0)
    for type_ in rng.choice(types, 3 * count, p=shares / shares.sum()):
        query = questions.sample_query(example.question_scene, type_, rng)
        answer = questions.truth(query, scene, example.labels)
        if answer != questions.truth(query, without_damaged, example.labels):
            continue  # depends on whether a damaged object still counts
        excess = balance[type_] if answer else -balance[type_]  # yes minus no, so far
        if excess > 1 and type_ in questions.SEMANTIC:
            continue
        text = questions.text(query, int(rng.integers(len(questions.WORDINGS[query.form]))))
        triple = (text, "yes" if answer else "no", query.type)
        balance[type_] += 1 if answer else -1
        if text in different:
            repeated.append(triple)
        different.setdefault(text, triple)
        if len(different) == count:
            break
    return [*different.values(), *repeated, *different.values()][:count]


def ratings_about(example: LabeledImage, rng: np.random.Generator) -> list[LabeledQuestion]:
    """Samples three prompts rated by the share of facts that hold, and a rating of the quality.

    Ratings are the words "0" to "10".
    """
    triples = []
    for index in range(3):
        scene = examples.train_scene(rng)
        if index < 2 and example.scene.objects:  # a match, or a partial match
            matching = example.scene.objects[: int(rng.integers(1, 4))]
            background = pick(rng, (example.scene.background, scene.background))
            objects = matching if index == 0 else (matching + scene.objects)[: scenes.MAX_OBJECTS]
            scene = scenes.Scene(objects, background)
        spec = describe(scene)
        if rng.random() < 0.5:
            spec = dataclasses.replace(spec, background=scene.background)
        truths = facts(spec, example.scene.objects, example.scene.background)
        prompt = language.prompt(spec, ({},) * len(spec.groups), rng)
        rating = round(10 * float(np.mean(list(truths.values()))))
        triples.append((RATE_PROMPT.format(prompt=prompt), str(rating), "match"))
    # Each fault costs four points; an open label costs none.
    faults = sum(not sound for sound in example.labels.values())
    triples.append((RATE_QUALITY, str(max(0, 10 - 4 * faults)), "drawing"))
    return triples
