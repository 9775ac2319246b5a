"""Measures what else the small UMM has learned: captioning, answering, editing and repairing.

    python -m alphagrpo_jax.shapes.measure --skills

On scenes of held-out combinations, with greedy texts, by the exact checker:

  caption  the caption is one of those that are true and complete; by instruction
  answer   the answer is the right word, of yes/no and open questions; `thinking` writes a think
           text first
  edit     every fact of the wanted scene holds; `places`: and every shape is in its cell
  repair   a picture that fails its (plain) prompt, redrawn after a reflection, fulfils it
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import build, policy, tasks
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rollout import RolloutOptions, pixels
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.sampling import image as drawing
from alphagrpo_jax.sampling import text as writing
from alphagrpo_jax.shapes import checker, examples, language, questions, requests, scenes, specs
from alphagrpo_jax.trained import Trained
from alphagrpo_jax.types import TextBlock, TextSample

SEED = 31
TEXT_TOKENS = 96  # of an answer, caption or think text at most
YES_NO_SHARE = 2 / 3  # of questions, as in pretraining


def heldout_scene(rng: np.random.Generator) -> scenes.Scene:
    """A random scene of a held-out combination."""
    while True:
        scene = scenes.random_scene(rng)
        if specs.describe(scene).split == "heldout":
            return scene


# ---------------------------------------------------------------- looking at pictures


def tell(
    policy_: Trained,
    images: np.ndarray,
    asked: Sequence[str],
    *,
    system: str = "",
    texts: int = 1,
) -> list[str]:
    """What the policy answers about each image, greedily.

    Args:
      policy_: who answers.
      images: uint8[B, H, W, 3], seen by the ViT alone.
      asked: B questions or instructions.
      system: system prompt; empty for none.
      texts: how many texts are written for each; the last one is returned.
    """
    loaded = policy_.loaded
    blocks = [_block(loaded.tokenizer, [system]) if system else None]
    blocks.append(_block(loaded.tokenizer, asked))
    sample = _tell(policy_.params, *blocks, images, model=loaded.model, texts=texts)
    rows = zip(np.asarray(sample.tokens), np.asarray(sample.mask), strict=True)
    return [loaded.tokenizer.decode(ids[held][1:-1]) for ids, held in rows]


def redraw(policy_: Trained, images: np.ndarray, asked: Sequence[str], *, seed: int) -> np.ndarray:
    """Thinks greedily about each image and what is asked, then draws another.

    Args:
      policy_: who draws; sampling is that of its configuration's `eval` section.
      images: uint8[B, 48, 48, 3].
      asked: B instructions.
      seed: of the noise.
    Returns:
      uint8[B, 48, 48, 3].
    """
    loaded = policy_.loaded
    drawn = _redraw(
        policy_.params,
        _block(loaded.tokenizer, [tasks.THINK_SYSTEM_PROMPT]),
        _block(loaded.tokenizer, asked),
        images,
        jax.random.key(seed),
        model=loaded.model,
        options=build.eval_options(policy_.config, loaded, tasks.TASKS["rt2i"]),
    )
    return np.asarray(drawn)


def _block(tokenizer: Tokenizer, texts: Sequence[str]) -> TextBlock:
    rows = [tokenizer.wrap(text) for text in texts]
    return TextBlock(*tokenizer.batch(rows, max(map(len, rows))))


@functools.partial(jax.jit, static_argnames=("model", "texts"))
def _tell(
    params: PolicyParams,
    system: TextBlock | None,
    asked: TextBlock,
    images: jax.Array,
    *,
    model: Bagel,
    texts: int,
) -> TextSample:
    """[system][image as ViT tokens][asked], then `texts` written ones; the last of them."""
    ctx = _begin(model, params, system, len(images))
    patches = patchify(_floats(images), model.config.vit.patch_size)
    ctx = policy.extend_vit(model, params, ctx, patches, model.config.vit_grid(*images.shape[1:3]))
    ctx, _ = policy.extend_text(model, params, ctx, asked.tokens, asked.mask)
    for _ in range(texts):
        sample, ctx = _write(model, params, ctx)
    return sample


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _redraw(
    params: PolicyParams,
    system: TextBlock,
    asked: TextBlock,
    images: jax.Array,
    key: jax.Array,
    *,
    model: Bagel,
    options: RolloutOptions,
) -> jax.Array:
    """[system][image as VAE and ViT tokens][asked][think], then an image, uint8[B, H, W, 3]."""
    count, grid = len(images), options.image.grid
    start = _begin(model, params, system, count)
    seen = policy.extend_image(model, params, start, _floats(images))
    ctx, _ = policy.extend_text(model, params, seen, asked.tokens, asked.mask)
    _, ctx = _write(model, params, ctx)
    unseen, _ = policy.extend_text(model, params, start, asked.tokens, asked.mask)
    contexts = GuidanceContexts(*(kv_cache.merge(each) for each in (ctx, seen, unseen)))
    initial_key, noise_key = jax.random.split(key)
    shape = (count, grid[0] * grid[1], model.config.latent_width)
    initial = jax.random.normal(initial_key, shape, jnp.float32)
    keys = jax.random.split(noise_key, count)
    sample = drawing.draw(
        model, params, contexts, initial, keys, jnp.int32(0), options=options.image
    )
    return pixels(model, params, sample.latents, grid)


def _begin(model: Bagel, params: PolicyParams, system: TextBlock | None, rows: int) -> Context:
    if system is None:
        return kv_cache.empty(rows)
    ctx, _ = policy.extend_text(model, params, kv_cache.empty(1), system.tokens, system.mask)
    return kv_cache.broadcast(ctx, rows)


def _write(model: Bagel, params: PolicyParams, ctx: Context) -> tuple[TextSample, Context]:
    """One greedy text per row."""
    keys = jax.random.split(jax.random.key(0), ctx.rope.shape[0])  # read by no greedy draw
    return writing.write(
        model,
        params,
        ctx,
        keys,
        max_tokens=TEXT_TOKENS,
        temperature=jnp.float32(0.0),
        top_p=1.0,
    )


def _floats(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1.0


# ---------------------------------------------------------------- the skills


def _grouped(scene: scenes.Scene) -> str:
    return language.join([language.counted(group) for group in specs.describe(scene).groups])


def _relations(scene: scenes.Scene) -> list[str]:
    first, second = scene.things[:2]
    a, b = (language.article(language.name(t.shape, t.color)) for t in (first, second))
    holding = [r for r in specs.RELATIONS if specs.related(r, first, second)]
    return [f"{a} {questions.WHERE[relation]} {b}" for relation in holding]


# Instruction -> the captions of a scene whose shapes are named in their order.
CAPTIONS: dict[str, Callable[[scenes.Scene], list[str]]] = {
    "Describe the layout.": lambda scene: [language.layout(scene)],
    "Describe the image.": lambda scene: [
        f"{_grouped(scene)} on a {scene.background} background",
    ],
    "List the shapes.": lambda scene: [language.join([t.shape for t in scene.things])],
    "Describe the background.": lambda scene: [f"{scene.background} background"],
    "What is in the image?": lambda scene: [_grouped(scene)],
    "Describe how two shapes lie.": _relations,
}


def captions(instruction: str, scene: scenes.Scene) -> set[str]:
    """All captions of a scene that are true and complete, whatever the order of the shapes."""
    orders = itertools.permutations(scene.things)
    return {
        text
        for order in orders
        for text in CAPTIONS[instruction](dataclasses.replace(scene, things=order))
    }


def captioning(policy_: Trained, count: int) -> dict[str, float]:
    """Share of `count` captions that are true and complete, and by instruction."""
    rng = np.random.default_rng((SEED, 0))
    asked, drawn = [], []
    while len(asked) < count:
        scene, instruction = heldout_scene(rng), specs.pick(rng, tuple(CAPTIONS))
        if CAPTIONS[instruction] is _relations and len(scene.things) < 2:
            continue
        asked.append(instruction)
        drawn.append(scene)
    said = tell(policy_, examples.images(drawn), asked)
    found = collections.defaultdict(list)
    for instruction, scene, text in zip(asked, drawn, said, strict=True):
        for name in ("caption", f"caption/{instruction}"):
            found[name].append(text in captions(instruction, scene))
    return _means(found)


def question(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question about a scene, its answer, and "yes_no" or "open"."""
    if rng.random() >= YES_NO_SHARE:
        return *questions.open_question(scene, rng), "open"
    query = questions.sample_query(scene, specs.pick(rng, questions.SEMANTIC), rng)
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    answer = "yes" if questions.truth(query, scene) else "no"
    return questions.text(query, wording), answer, "yes_no"


def answering(policy_: Trained, count: int) -> dict[str, float]:
    """Share of `count` questions answered with the right words, at once and after thinking."""
    rng = np.random.default_rng((SEED, 1))
    drawn = [heldout_scene(rng) for _ in range(count)]
    asked, answers, forms = zip(*(question(scene, rng) for scene in drawn), strict=True)
    images, found = examples.images(drawn), collections.defaultdict(list)
    ways = {"answer": ("", 1), "answer/thinking": (tasks.ANSWER_SYSTEM_PROMPT, 2)}
    for way, (system, texts) in ways.items():
        said = tell(policy_, images, asked, system=system, texts=texts)
        for text, answer, form in zip(said, answers, forms, strict=True):
            for name in (way, f"{way}/{form}"):
                found[name].append(text == answer)
    return _means(found)


def edit(rng: np.random.Generator) -> tuple[scenes.Scene, str, scenes.Scene]:
    """A scene of a held-out combination, one change of it in words, and the scene changed."""
    while True:
        scene = heldout_scene(rng)
        if all(group.count == 1 for group in specs.describe(scene).groups):
            break
    return scene, *examples.change(rng, scene, specs.pick(rng, examples.operations(scene)))


def editing(policy_: Trained, count: int) -> dict[str, float]:
    """Share of `count` edits after which the wanted scene is there, by facts and by places."""
    rng = np.random.default_rng((SEED, 2))
    before, asked, targets = zip(*(edit(rng) for _ in range(count)), strict=True)
    images = redraw(policy_, examples.images(before), asked, seed=SEED)
    pairs = list(zip(images, targets, strict=True))
    return _means(
        {
            "edit": [checker.exact_all(image, whole(target)) for image, target in pairs],
            "edit/places": [checker.same(image, target) for image, target in pairs],
        }
    )


def repairing(policy_: Trained, count: int) -> dict[str, float]:
    """Share of `count` failed pictures that fulfil their prompt after a reflection."""
    rng = np.random.default_rng((SEED, 3))
    wanted = [requests.draw_plain(rng, split="heldout") for _ in range(count)]
    failed = [
        examples.flawed(rng, each.spec, specs.sample_scene(each.spec, rng))[0] for each in wanted
    ]
    asked = [tasks.REFLECTION_REQUEST.format(prompt=each.text) for each in wanted]
    images = redraw(policy_, examples.images(failed), asked, seed=SEED)
    pairs = zip(images, wanted, strict=True)
    return _means({"repair": [checker.exact_all(image, each.spec) for image, each in pairs]})


def measure(policy_: Trained, count: int) -> dict[str, float]:
    """All skills, `count` examples of each."""
    skills = (captioning, answering, editing, repairing)
    return {name: share for skill in skills for name, share in skill(policy_, count).items()}


def whole(scene: scenes.Scene) -> specs.Spec:
    """The spec that names every kind of shape in a scene, and the background."""
    return dataclasses.replace(specs.describe(scene), background=scene.background)


def _means(found: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(held)) for name, held in sorted(found.items())}
