"""Cases c8, c9, c13: images by ODE, stochastic steps, the official pipeline end to end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.flow import sde
from alphagrpo_jax.flow.guidance import Guidance, is_active
from alphagrpo_jax.flow.schedule import sigmas
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.kv_cache import GuidanceContexts
from alphagrpo_jax.ops.patchify import unpatchify
from alphagrpo_jax.parity.fixture import role
from alphagrpo_jax.parity.image_cases import nchw
from alphagrpo_jax.parity.model import Port
from alphagrpo_jax.parity.text_cases import Outputs, greedy
from alphagrpo_jax.runtime.images import to_uint8

# The official defaults of an option that a call leaves out.
GENERATE_IMAGE = {
    "num_timesteps": 24, "timestep_shift": 1.0, "cfg_interval": (0, 1), "cfg_text_scale": 1.0,
    "cfg_img_scale": 1.0, "cfg_renorm_min": 0.0, "cfg_renorm_type": "global",
}  # fmt: skip
INFERENCER = GENERATE_IMAGE | {
    "num_timesteps": 50, "timestep_shift": 3.0, "cfg_interval": (0.4, 1.0), "cfg_text_scale": 3.0,
    "cfg_img_scale": 1.5, "think": False, "max_think_token_n": 1000,
}  # fmt: skip


def guidance_of(options: dict) -> Guidance:
    """Converts official options to a guidance."""
    return Guidance(
        text_scale=options["cfg_text_scale"],
        image_scale=options["cfg_img_scale"],
        interval=tuple(options["cfg_interval"]),
        renorm=options["cfg_renorm_type"],
        renorm_min=options["cfg_renorm_min"],
    )


def ode(port: Port, contexts: GuidanceContexts, noise: np.ndarray, options: dict) -> Outputs:
    """Samples by ODE; returns latents before every step and at the end [N, M, C], velocities
    [N - 1, M, C], noise levels, and the text scale of every step.
    """
    guidance = guidance_of(options)
    levels = sigmas(options["num_timesteps"], shift=options["timestep_shift"])
    contexts = jax.tree.map(
        kv_cache.merge, contexts, is_leaf=lambda node: isinstance(node, kv_cache.Context)
    )
    x = jnp.asarray(noise)
    latents, steps, scales = [x], [], []
    for level, following in itertools.pairwise(levels):
        active = is_active(guidance, level)
        v = port.guided_velocity(contexts, x, level, guidance, active=active)
        x = sde.ode_step(x[None], v[None], level, following)[0]
        latents.append(x)
        steps.append(v)
        scales.append(guidance.text_scale if active else 1.0)
    return {
        "timesteps": levels,
        "cfg_text_scale": np.asarray(scales, np.float32),
        "latents": np.stack(latents),
        "velocities": np.stack(steps),
    }


def image_of(port: Port, latents: np.ndarray | jax.Array) -> Outputs:
    """Decodes final latents [M, C], in the forms that the official code passes through."""
    patch = port.config.latent_patch_size
    latent = unpatchify(jnp.asarray(latents)[None], patch, port.latent_grid())
    image = port.call(port.params, method="decode_image", latents=latent)
    return {
        "final_latent_nchw": nchw(latent),
        "image_float": nchw(image),
        "image_uint8": to_uint8(np.asarray(image[0])),
    }


def generating(port: Port, case: str) -> Outputs:
    """Recomputes c8*: an image by ODE in the contexts of c5, or of c7 for an edit."""
    options = GENERATE_IMAGE | port.fixture.options(f"{case}.latents")
    contexts = port.editing() if "edit" in case else port.drawing()
    noise = initial_noise(port, case)
    run = {"init_noise": noise} | ode(port, contexts, noise, options)
    run |= image_of(port, run["latents"][-1])
    return {f"{case}.{name}": value for name, value in run.items()}


def initial_noise(port: Port, case: str) -> np.ndarray:
    """Returns the recorded noise that a run starts from: its own, or the input equal to its first
    latents.
    """
    name = f"{case}.init_noise"
    if name in port.fixture.arrays:
        return port.array(name)
    first = port.array(f"{case}.latents")[0]
    for candidate, array in port.fixture.arrays.items():
        if role(candidate) == "input" and np.array_equal(array, first):
            return array
    raise ValueError(f"{case}: none of the given arrays is the noise that the run starts from")


def stepping(port: Port) -> Outputs:
    """Recomputes c9: Flow-SDE and Flow-CPS steps from recorded latents, velocity and noise."""
    levels = step_levels(port)
    out: Outputs = {"c9.timesteps": levels}
    for name, match in port.fixture.matching(r"c9\.step(\d+)_z"):
        index, prefix = int(match.group(1)), name.removesuffix("_z")
        x, v, z = (jnp.asarray(port.array(f"{prefix}_{name}"))[None] for name in "xvz")
        level, following = levels[index], levels[index + 1]
        noise = port.fixture.number(f"{prefix}_sde_std", r"noise_level ([\d.]+)")
        step = sde.sde_step(x, v, level, following, levels[1], noise, z)
        log_prob = sde.sde_log_prob(step.next, step.mean, step.std, level, following)
        out |= _step(f"{prefix}_sde", step, log_prob)
        step = sde.cps_step(x, v, level, following, noise, z)
        out |= _step(f"{prefix}_cps", step, sde.cps_log_prob(step.next, step.mean))
    return out


def step_levels(port: Port) -> np.ndarray:
    """Returns the noise levels of c9, from its description `linspace(1,0,N) shifted by S`."""
    points = int(port.fixture.number("c9.timesteps", r"linspace\(1, *0, *(\d+)\)"))
    return sigmas(points, shift=port.fixture.number("c9.timesteps", r"shifted by ([\d.]+)"))


def _step(prefix: str, step: sde.StochasticStep, log_prob: jax.Array) -> Outputs:
    return {
        f"{prefix}_std": step.std,
        f"{prefix}_mean": step.mean[0],
        f"{prefix}_next": step.next[0],
        f"{prefix}_logprob": log_prob[0],
    }


def pipeline(port: Port) -> Outputs:
    """Recomputes c13: the official pipeline, its think text decoded and encoded again."""
    out = {}
    for name, match in port.fixture.matching(r"(c13\.\w+)\.image_uint8"):
        run = match.group(1)
        options = INFERENCER | port.fixture.options(name)
        contexts, think = pipeline_contexts(port, run, options)
        if think is not None:
            out[f"{run}.think_ids"] = think
        sampled = ode(port, contexts, port.array(f"{run}.init_noise"), options)
        out[f"{run}.latents"], out[f"{run}.velocities"] = sampled["latents"], sampled["velocities"]
        out[name] = image_of(port, sampled["latents"][-1])["image_uint8"]
    return out


def pipeline_contexts(
    port: Port, run: str, options: dict
) -> tuple[GuidanceContexts, np.ndarray | None]:
    """Returns the contexts that a run samples in, and the ids of its think text."""
    start = kv_cache.empty(1)
    if options["think"]:
        start = port.text(start, "c6.system")
    before = port.vit_block(port.vae_block(start)) if "edit" in run else start
    prompt = f"{run}.prompt"
    if prompt not in port.fixture.texts:
        prompt = f"{run.removesuffix('think')}.prompt"
    gen, without_image = port.text(before, prompt), port.text(start, prompt)
    if not options["think"]:
        return GuidanceContexts(gen, before, without_image), None
    tokens, _ = greedy(port, gen, options["max_think_token_n"], port.tokenizer.special.im_end)
    text = port.tokenizer.decode(tokens).split("<|im_end|>")[0].split("<|im_start|>")[1]
    think = port.ids(text)
    gen, _ = port.append_ids(gen, think)
    return GuidanceContexts(gen, before, without_image), think
