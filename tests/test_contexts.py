"""The contexts that a task's steps see: against the official model's recorded velocities and texts,
and against contexts that are computed anew, from nothing, by the table's words.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import policy, tasks
from alphagrpo_jax.config import Guidance
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.parity.fixture import load_fixture
from alphagrpo_jax.parity.model import Port
from alphagrpo_jax.parity.text_cases import greedy
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.sampling import contexts as contexts_lib
from alphagrpo_jax.sampling import trajectory
from alphagrpo_jax.sampling.text import text_log_probs
from alphagrpo_jax.tasks import ANSWER, GIVEN_IMAGE, IMAGE, SEEN_IMAGE, SYSTEM, TEXT, THINK
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.types import ImageBlock, Rollout, TextBlock, TextSample

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden_a"
EDIT = Guidance(
    text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel", renorm_min=0.0
)
THOUGHT = dataclasses.replace(EDIT, image_scale=1.5, renorm="global")


# ------------------------------------------------------ against the official model


@pytest.fixture(scope="module")
def port():
    return Port(load_fixture(GOLDEN))


def given_image(port) -> ImageBlock:
    """The recorded image, whose values lie between those of uint8."""
    pair = []
    for name in ("c2.vae_image", "c2.vit_image"):
        floats = port.array(name).transpose(1, 2, 0)[None]
        pair.append(jnp.asarray((floats * 0.5 + 0.5) * 255.0))
    return ImageBlock(*pair)


def contexts_of(port, events, inputs, texts, system="c6.system"):
    """The pieces of given inputs and think texts, and the plan that says where they stand."""
    plan = tasks.plan(events)
    samples = tuple(
        TextSample(ids[None], jnp.ones((1, len(ids)), bool), None, None, None) for ids in texts
    )
    owner = jnp.zeros(1, jnp.int32)
    rollout = Rollout(inputs=inputs, owner=owner, pieces=(), texts=samples, images=())
    pieces = contexts_lib.rebuild(
        port.model,
        port.params,
        rollout,
        plan=plan,
        system_tokens=tuple(port.ids_of(system).tolist()),
        grid=port.latent_grid(),
    )
    return pieces, plan


def block(ids) -> TextBlock:
    return TextBlock(jnp.asarray(ids)[None], jnp.ones((1, len(ids)), bool))


def test_thinking_before_drawing_is_c6(port):
    events, think = tasks.TASKS["rt2i"].events, port.ids_of("c6.think")
    pieces, plan = contexts_of(port, events, (block(port.ids_of("c6.prompt")),), [think])
    contexts = contexts_lib.guidance_contexts(pieces, plan.image_steps[0], jnp.zeros(1, jnp.int32))
    for sigma, name in ((1.0, "s1"), (0.75, "s0p75"), (0.3, "s0p3")):
        v = port.combined_velocity(contexts, port.array("c6.x_t")[None], sigma, THOUGHT)
        expected = port.array(f"c6.v_{name}_text4_img1p5_global")
        np.testing.assert_allclose(v[0], expected, atol=1e-4, rtol=1e-4)
    got = log_probs(port, pieces, plan.text_steps[0], think)
    expected = port.array("c6.think_logprobs_T1.0")
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def log_probs(port, pieces, step, ids):
    """Of a text in the context of a text step, float32[T - 1]."""
    return text_log_probs(
        port.model,
        port.params,
        contexts_lib.context(pieces, step.gen, jnp.zeros(1, jnp.int32)),
        jnp.asarray(ids)[None],
        jnp.ones((1, len(ids)), bool),
        temperature=1.0,
    ).log_prob[0]


@pytest.mark.parametrize("name", ["ti2i", "srr"])
def test_writing_about_an_image_is_c7(port, name):
    """A reflection, and the think text of an edit."""
    inputs = (given_image(port), block(port.ids_of("c7.instruction")))
    answer = port.ids_of("c7.answer")
    pieces, plan = contexts_of(port, tasks.TASKS[name].events, inputs, [answer])
    got = log_probs(port, pieces, plan.text_steps[0], answer)
    expected = port.array("c7.answer_logprobs_T1.0")
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_an_image_to_be_understood_is_c7(port):
    """The recorded text stands right behind the image, without a system prompt."""
    ids = port.ids_of("c7.und_prompt")
    pieces, plan = contexts_of(port, (SEEN_IMAGE, ANSWER), (given_image(port),), [])
    got = log_probs(port, pieces, plan.text_steps[0], ids)
    rows = jax.nn.log_softmax(port.array("c7.und_logits"))[:-1]
    expected = np.take_along_axis(rows, ids[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_answering_is_the_official_pipelines_c13(port):
    """Its greedy think text, recorded as what it decodes to."""
    inputs = (given_image(port), block(port.ids_of("c7.und_prompt")))
    events = tasks.TASKS["ti2t"].events
    pieces, plan = contexts_of(port, events, inputs, [port.ids("")], "c13.system_und")
    context = contexts_lib.context(pieces, plan.text_steps[0].gen, jnp.zeros(1, jnp.int32))
    tokens, _ = greedy(port, context, 12, port.tokenizer.special.im_end)
    text = port.tokenizer.decode(tokens).split("<|im_start|>")[1]
    assert text == port.fixture.texts["c13.und_think_output"]


def test_the_fixed_texts_are_the_official_ones(port):
    assert port.fixture.texts["c6.system"] == tasks.THINK_SYSTEM_PROMPT
    assert port.fixture.texts["c13.system_und"] == tasks.ANSWER_SYSTEM_PROMPT
    for name, prompt in (
        ("rt2i", "c6.system"), ("srr", "c6.system"), ("ti2i", "c6.system"),
        ("ti2t", "c13.system_und"),
    ):  # fmt: skip
        assert tasks.TASKS[name].system_prompt == port.fixture.texts[prompt]


@pytest.mark.parametrize("name", ["ti2i", "srr"])
def test_editing_is_c7(port, name):
    """Without a think text, which c7 has not: the image step right behind the instruction."""
    events = tuple(event for event in tasks.TASKS[name].events if event != THINK)
    inputs = (given_image(port), block(port.ids_of("c7.instruction")))
    pieces, plan = contexts_of(port, events, inputs, [])
    contexts = contexts_lib.guidance_contexts(pieces, plan.image_steps[0], jnp.zeros(1, jnp.int32))
    for sigma, level in ((1.0, "s1"), (0.75, "s0p75"), (0.3, "s0p3")):
        v = port.combined_velocity(contexts, port.array("c7.x_t")[None], sigma, EDIT)
        expected = port.array(f"c7.v_{level}_text4_img2_textchannel")
        np.testing.assert_allclose(v[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("run", "name"), [("think", "rt2i"), ("editthink", "ti2i")])
def test_first_velocity_of_the_official_pipeline_is_c13(port, run, name):
    prompt = f"c13.{run}.prompt"
    if prompt not in port.fixture.texts:
        prompt = f"c13.{run.removesuffix('think')}.prompt"
    inputs = (block(port.ids_of(prompt)),)
    inputs = (given_image(port), *inputs) if name == "ti2i" else inputs
    ids = port.array(f"c13.{run}.think_ids")
    text = port.tokenizer.decode(ids).split("<|im_end|>")[0].split("<|im_start|>")[1]
    pieces, plan = contexts_of(port, tasks.TASKS[name].events, inputs, [port.ids(text)])
    contexts = contexts_lib.guidance_contexts(pieces, plan.image_steps[0], jnp.zeros(1, jnp.int32))
    options = port.fixture.options(f"c13.{run}.image_uint8")
    guidance = dataclasses.replace(
        EDIT,
        text_scale=options.get("cfg_text_scale", 3.0),
        image_scale=options.get("cfg_img_scale", 1.5),
        renorm=options.get("cfg_renorm_type", "global"),
    )
    noise = port.array(f"c13.{run}.init_noise")
    v = port.combined_velocity(contexts, noise[None], 1.0, guidance)
    expected = port.array(f"c13.{run}.velocities")[0]
    np.testing.assert_allclose(v[0], expected, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------- against brute force


LISTS = {
    "refinement": (SYSTEM, GIVEN_IMAGE, TEXT, THINK, IMAGE),
    "answer": (SYSTEM, SEEN_IMAGE, TEXT, THINK, ANSWER),
    "two turns": (SYSTEM, TEXT, THINK, IMAGE, TEXT, THINK, IMAGE),
    "an answer in between": (TEXT, ANSWER, TEXT, IMAGE),
}


def by_the_table(events):
    """(gen, cfg_text, cfg_img) before each event, as lists of events; the table word by word."""
    gen, text, image, before = [], [], [], []
    for index, kind in enumerate(events):
        before.append((list(gen), list(text), list(image)))
        old = list(gen)
        if kind == SYSTEM:
            gen, image = [*gen, index], [*image, index]
        elif kind == TEXT:
            gen, text, image = [*gen, index], old, [*image, index]
        elif kind in (GIVEN_IMAGE, SEEN_IMAGE, IMAGE):
            gen = [*gen, index]
            text = list(gen)
        elif kind == THINK:
            gen = [*gen, index]
        elif kind == ANSWER:
            gen, text, image = [*gen, index], [*text, index], [*image, index]
    return before


@pytest.fixture(scope="module")
def setting():
    config = tiny_world.config(pathlib.Path("unused"))
    config.train.group_size = config.train.prompts_per_step = config.rollout.micro_batch = 2
    config.train.micro_batch = 2
    return tiny_world.model(), config_lib.from_config_dict(config)


def inputs_of(loaded, config, events):
    """Two prompts' inputs: texts of different lengths, images of noise."""
    rng, words, blocks = np.random.default_rng(4), list(tiny_world.WORDS), []
    for kind in events:
        if kind == TEXT:
            rows = [loaded.tokenizer.wrap(words.pop()) for _ in range(2)]
            blocks.append(TextBlock(*loaded.tokenizer.batch(rows, config.rollout.prompt_tokens)))
        elif kind in (GIVEN_IMAGE, SEEN_IMAGE):
            pixels = rng.integers(0, 256, (2, tiny_world.SIDE, tiny_world.SIDE, 3), np.uint8)
            blocks.append(ImageBlock(pixels, pixels))
    return tuple(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTS)
def test_contexts_are_those_computed_from_nothing(setting, name):
    loaded, config = setting
    events = LISTS[name]
    texts = ("{prompt}",) * events.count(TEXT)
    image = "record" if {GIVEN_IMAGE, SEEN_IMAGE} & set(events) else ""
    task = tasks.Task("own", events, system_prompt="think", texts=texts, image=image)
    spec = options_lib.rollout_spec(config, loaded, task)
    params, inputs = PolicyParams(loaded.base), inputs_of(loaded, config, events)
    run = jax.jit(functools.partial(trajectory.sample_trajectories, loaded.model, spec=spec))
    numbers = (jax.random.key(5), jnp.int32(0), jnp.int32(1), jnp.float32(1.0))
    sampled, _ = run(params, inputs, *numbers)
    blocks = event_blocks(loaded, sampled, spec, events)

    def extend(ctx, kind, content):
        if kind == SEEN_IMAGE:
            patches = patchify(floats(content.vit_pixels), loaded.config.vit.patch_size)
            return policy.extend_vit(
                loaded.model,
                params,
                ctx,
                patches,
                loaded.config.vit_grid(*content.vit_pixels.shape[1:3]),
            )
        if kind in (GIVEN_IMAGE, IMAGE):
            return policy.extend_image(loaded.model, params, ctx, floats(content.pixels))
        return policy.extend_text(loaded.model, params, ctx, content.tokens, content.mask)[0]

    @functools.cache  # contexts share beginnings
    def context_of(*wanted):
        if not wanted:
            return kv_cache.empty(4)
        return extend(context_of(*wanted[:-1]), events[wanted[-1]], blocks[wanted[-1]])

    probe = jax.random.normal(jax.random.key(1), (4, 4, loaded.config.latent_width))
    look = jax.jit(functools.partial(policy.velocity, loaded.model, grid=(2, 2)))
    before = by_the_table(events)
    for step in spec.plan.steps:
        for nodes, wanted in zip(
            (step.gen, step.cfg_text, step.cfg_img), before[step.event], strict=True
        ):
            ctx = context_of(*wanted)
            rebuilt = contexts_lib.context(sampled.pieces, nodes, sampled.owner)
            np.testing.assert_array_equal(rebuilt.rope, ctx.rope)
            level = jnp.full(4, 0.7)
            pair = [
                look(params, kv_cache.merge(context), probe, level) for context in (rebuilt, ctx)
            ]
            # A generated image is cut to whole levels, where another compilation may flip a pixel.
            atol = 1e-3 if IMAGE in events[: step.event] else 2e-5
            np.testing.assert_allclose(*pair, atol=atol)


def floats(pixels):
    return (jnp.asarray(pixels, jnp.float32) / 255.0 - 0.5) / 0.5


def event_blocks(loaded, sampled, spec, events):
    """What each event added, four rows each."""
    inputs, texts, images = iter(sampled.inputs), iter(sampled.texts), iter(sampled.images)
    blocks = []
    for kind in events:
        if kind == SYSTEM:
            tokens = jnp.tile(jnp.asarray(spec.system_tokens, jnp.int32)[None], (4, 1))
            blocks.append(TextBlock(tokens, jnp.ones(tokens.shape, bool)))
        elif kind == IMAGE:
            latents = next(images).latents
            pixels = contexts_lib.pixels(loaded.model, PolicyParams(loaded.base), latents, (2, 2))
            blocks.append(ImageBlock(pixels, pixels))
        elif kind in (THINK, ANSWER):
            sample = next(texts)
            blocks.append(TextBlock(sample.tokens, sample.mask))
        else:
            blocks.append(next(inputs))
    return blocks
