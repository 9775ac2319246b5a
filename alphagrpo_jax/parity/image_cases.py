"""Cases c2, c5, c6, c7, c10: encoders, velocities with guidance, edits, batches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.config import Guidance
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.ops.norm import rms_norm
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.ops.posembed import grid_ids, timestep_features
from alphagrpo_jax.parity.model import Port, cache_arrays, context_sizes, reading_order
from alphagrpo_jax.parity.text_cases import Outputs, log_prob_outputs, prompt_ids

UNGUIDED = Guidance(
    text_scale=1.0, image_scale=1.0, interval=(0.0, 1.0), renorm="global", renorm_min=0.0
)
RENORMS = {"global": "global", "channel": "channel", "textchannel": "text_channel"}


def nchw(x: jax.Array) -> np.ndarray:
    """Transposes [B, H, W, C] to [B, C, H, W]."""
    return np.asarray(x).transpose(0, 3, 1, 2)


def encoders(port: Port) -> Outputs:
    """Recomputes c2: ViT, connector, VAE both ways, time embedding."""
    patches, grid = port.vit_patches()
    features = port.call(port.params, method="vit_features", patches=patches, grid=grid)
    mean, log_variance = port.call(port.params, method="moments", images=port.vae_image())
    latent = port.image_latent
    recorded_latent = jnp.asarray(port.array("c2.decode_latent").transpose(0, 2, 3, 1))
    image = port.call(port.params, method="decode_image", latents=recorded_latent)
    times = jnp.asarray(port.array("c2.time_t"))
    return {
        "c2.vit_tokens": patches[0],
        "c2.vit_position_ids": grid_ids(grid, port.config.vit_max_num_patch_per_side),
        "c2.vit_last_hidden": features[0],
        "c2.connector_out": port.call(port.params, method="connect", features=features)[0],
        "c2.vit_features": port.call(
            port.params, method="embed_patches", patches=patches, grid=grid
        )[0],
        "c2.vae_mean": nchw(mean),
        "c2.vae_logvar": nchw(log_variance),
        "c2.vae_latent": nchw(latent),
        "c2.vae_latent_tokens": patchify(latent, port.config.latent_patch_size)[0],
        "c2.decode_image": nchw(image),
        "c2.time_freq": timestep_features(times),
        "c2.time_embed": port.call(port.params, method="embed_time", sigma=times),
    }


def parse_guidance(words: str) -> Guidance:
    """Parses the guidance of a name's tail.

    For example `nocfg`, `text4_img2_textchannel`, `text4_global_rmin0p95`.
    """
    fields = {}
    for word in words.split("_"):
        number = re.fullmatch(r"(text|img|rmin)([\dp]+)", word)
        if number:
            key = {"text": "text_scale", "img": "image_scale", "rmin": "renorm_min"}
            fields[key[number.group(1)]] = float(number.group(2).replace("p", "."))
        elif word in RENORMS:
            fields["renorm"] = RENORMS[word]
        elif word not in ("nocfg", "only"):
            raise ValueError(f"unknown word {word!r} in the guidance {words!r}")
    return dataclasses.replace(UNGUIDED, **fields)


def velocities(port: Port, case: str, contexts: GuidanceContexts) -> Outputs:
    """Recomputes every recorded `CASE.v_sSIGMA_GUIDANCE`."""
    out = {}
    x = port.array(f"{case}.x_t")[None]
    for name, match in port.fixture.matching(rf"{case}\.v_s([\dp]+)_(\w+)"):
        sigma, words = float(match.group(1).replace("p", ".")), match.group(2)
        if words == "uncond_text":
            unguided = GuidanceContexts(contexts.cfg_text, contexts.cfg_text, contexts.cfg_text)
            out[name] = port.combined_velocity(unguided, x, sigma, parse_guidance("nocfg"))[0]
        else:
            out[name] = port.combined_velocity(contexts, x, sigma, parse_guidance(words))[0]
    return out


def drawing(port: Port) -> Outputs:
    """Recomputes c5: velocities of text to image, and the layers of one denoising block."""
    contexts = port.drawing()
    out = prompt_ids(port, "c5") | velocities(port, "c5", contexts)
    for name, match in port.fixture.matching(r"c5\.s([\dp]+)_hidden"):
        out |= _latent_layers(port, contexts.gen, float(match.group(1).replace("p", ".")), name)
    return out


def _latent_layers(port: Port, ctx: Context, sigma: float, name: str) -> Outputs:
    """Returns a denoising block's hidden states [M + 2, D] after every layer and the norms."""
    special, x = port.tokenizer.special, jnp.asarray(port.array("c5.x_t"))[None]
    marks = jnp.array([[special.vision_start, special.vision_end]], jnp.int32)
    level = jnp.full((1,), sigma, jnp.float32)
    und = port.call(port.params, method="embed_text", tokens=marks)
    gen = port.call(port.params, method="embed_latents", x=x, sigma=level, grid=port.latent_grid())
    length = gen.shape[1] + 2
    positions = jnp.broadcast_to(ctx.rope[:, None], (1, length))
    self_mask = jnp.ones((1, 1, length), bool)
    outputs = port.layers(Tokens(und, gen), positions, ctx, self_mask)
    decoder = port.params.base["language_model"]
    epsilon = port.config.llm.rms_norm_eps
    hidden_by_expert = [
        (suffix, rms_norm(x, decoder["norm" + suffix]["scale"], epsilon))
        for suffix, x in outputs[-1].by_expert()
    ]
    prefix = name.removesuffix("_hidden")
    by_name = {f"{prefix}_layer{i}": layer.by_expert() for i, layer in enumerate(outputs)}
    by_name[name] = hidden_by_expert
    return {
        key: reading_order(np.concatenate([x[0] for _, x in tokens]), 0)
        for key, tokens in by_name.items()
    }


def thinking(port: Port) -> Outputs:
    """Recomputes c6: velocities and text scores with a think text."""
    contexts = port.thinking()
    out = prompt_ids(port, "c6") | velocities(port, "c6", contexts)
    ids = port.ids_of("c6.think")
    _, hidden = port.append_ids(contexts.cfg_img, ids)
    out |= log_prob_outputs(port, "c6.think", port.logits(port.params, hidden[None])[0], ids)
    for label in ("gen", "cfg_text", "cfg_img"):
        out |= context_sizes(getattr(contexts, label), f"c6.{label}")
    return out


def editing(port: Port) -> Outputs:
    """Recomputes c7: velocities, cache and texts with an image in the context."""
    contexts = port.editing()
    out = prompt_ids(port, "c7") | velocities(port, "c7", contexts)
    out |= context_sizes(port.vae_block(port.text(kv_cache.empty(1), "c6.system")), "c7.after_vae")
    out |= context_sizes(contexts.cfg_text, "c7.after_vit")
    out |= context_sizes(contexts.gen, "c7.gen") | context_sizes(contexts.cfg_img, "c7.cfg_img")
    out["c7.gen.key_cache"], out["c7.gen.value_cache"] = cache_arrays(contexts.gen, (1,))
    answer = port.ids_of("c7.answer")
    _, hidden = port.append_ids(contexts.gen, answer)
    out["c7.answer_logits"] = logits = port.logits(port.params, hidden[None])[0]
    out |= log_prob_outputs(port, "c7.answer", logits, answer)
    question = port.ids_of("c7.und_prompt")
    _, hidden = port.append_ids(port.vit_block(kv_cache.empty(1)), question)
    out["c7.und_logits"] = port.logits(port.params, hidden[None])[0]
    out["c7.und_ids"] = question
    return out


def batches(port: Port) -> Outputs:
    """Recomputes c10: a padded batch of two, and its samples one by one."""
    rows = [port.ids_of("c10.prompt0"), port.ids_of("c10.prompt1")]
    tokens, mask = port.tokenizer.batch([list(row) for row in rows], max(map(len, rows)))
    ctx, hidden = port.extend_text(
        port.params, kv_cache.empty(2), jnp.asarray(tokens), jnp.asarray(mask)
    )
    out = prompt_ids(port, "c10") | context_sizes(ctx, "c10.batch")
    logits = np.asarray(port.logits(port.params, hidden))
    out["c10.packed_logits"] = logits[mask]
    sigma = port.fixture.number("c10.packed_nocfg", r"timestep ([\d.]+)")
    x = jnp.asarray(port.array("c10.x_t"))
    batch = GuidanceContexts(ctx, kv_cache.empty(2), ctx)
    for name, match in port.fixture.matching(r"c10\.packed_((?:nocfg|text)\w*)"):
        if not name.endswith("_JOINT"):
            guidance = parse_guidance(match.group(1))
            out[name] = port.combined_velocity(batch, x, sigma, guidance)
    for index, row in enumerate(rows):
        ctx, hidden = port.append_ids(kv_cache.empty(1), row)
        out[f"c10.single{index}_logits"] = port.logits(port.params, hidden[None])[0]
        contexts = GuidanceContexts(ctx, kv_cache.empty(1), ctx)
        for name, match in port.fixture.matching(rf"c10\.single{index}_((?:nocfg|text)\w*)"):
            guidance = parse_guidance(match.group(1))
            out[name] = port.combined_velocity(contexts, x[index : index + 1], sigma, guidance)[0]
    return out
