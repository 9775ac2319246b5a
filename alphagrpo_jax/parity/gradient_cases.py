"""Cases c11, c14: gradients of velocities, texts and transitions; the pretraining forward."""

import dataclasses
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import traverse_util

from alphagrpo_jax import policy
from alphagrpo_jax.flow import sde
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.models.name_table import entries
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.parity.image_cases import UNGUIDED, parse_guidance
from alphagrpo_jax.parity.model import Port
from alphagrpo_jax.parity.sampling_cases import step_levels, stepping
from alphagrpo_jax.parity.text_cases import Outputs, text_log_probs
from alphagrpo_jax.policy import PolicyParams

Loss = Callable[[PolicyParams], jax.Array]


def gradients(port: Port) -> Outputs:
    """Recomputes c11: losses, gradients by checkpoint name, and the norms of all gradients."""
    out = {}
    for name, match in port.fixture.matching(r"c11\.(.+)\.loss"):
        case = f"c11.{match.group(1)}"
        value, grads = jax.jit(jax.value_and_grad(_loss(port, match.group(1))))(port.params)
        out[name] = value
        out |= named_gradients(port, case, grads.base)
    return out


def named_gradients(port: Port, case: str, grads: dict) -> Outputs:
    """Returns `CASE.grad.NAME` and `CASE.grad_norms` from a gradient tree."""
    flat = traverse_util.flatten_dict(grads)
    by_name = {entry.name: entry for entry in entries(grads)}

    def gradient(name: str) -> np.ndarray:
        entry = by_name[name]
        leaf = np.asarray(flat[entry.path])
        return entry.to_file(leaf if entry.layer is None else leaf[entry.layer])

    prefix = f"{case}.grad."
    recorded = [name for name in port.fixture.arrays if name.startswith(prefix)]
    out: Outputs = {name: gradient(name.removeprefix(prefix)) for name in recorded}
    norms = [np.linalg.norm(gradient(name)) for name in port.fixture.grad_norm_names[case]]
    out[f"{case}.grad_norms"] = np.asarray(norms, np.float32)
    return out


def _loss(port: Port, kind: str) -> Loss:
    """Returns the loss of one of c11's sub-cases."""
    text = re.fullmatch(r"text(_detached)?_T([\d.]+)", kind)
    if text:
        return _text_loss(port, float(text.group(2)), detached=text.group(1) is not None)
    transition = re.fullmatch(r"(sde|cps)(\d+)", kind)
    if transition:
        return _transition_loss(port, transition.group(1), int(transition.group(2)))
    if kind == "edit":
        return _edit_loss(port)
    return _flow_loss(port, detached={"flow": False, "flow_detached": True}[kind])


def _sigma(port: Port, case: str) -> float:
    return port.fixture.number(f"{case}.loss", r"sigma ([\d.]+)")


def _flow_loss(port: Port, *, detached: bool) -> Loss:
    sigma, guidance = _sigma(port, "c11.flow"), parse_guidance("text4_global")

    def loss(params: PolicyParams) -> jax.Array:
        contexts = port.drawing(params)
        if detached:
            contexts = jax.tree.map(jax.lax.stop_gradient, contexts)
        x = port.array("c5.x_t")
        return jnp.mean(port.guided_velocity(contexts, x, sigma, guidance, params=params) ** 2)

    return loss


def _edit_loss(port: Port) -> Loss:
    sigma, guidance = _sigma(port, "c11.edit"), parse_guidance("text4_img2_textchannel")

    def loss(params: PolicyParams) -> jax.Array:
        x, contexts = port.array("c7.x_t"), port.editing(params)
        return jnp.mean(port.guided_velocity(contexts, x, sigma, guidance, params=params) ** 2)

    return loss


def _text_loss(port: Port, temperature: float, *, detached: bool) -> Loss:
    def loss(params: PolicyParams) -> jax.Array:
        ctx = port.text(kv_cache.empty(1), "c3.prompt", params=params)
        if detached:
            ctx = kv_cache.stop_gradient(ctx)
        ids = port.ids_of("c3.second")
        _, hidden = port.append_ids(ctx, ids, params)
        logits = port.logits(params, hidden[None])[0]
        log_prob, _ = text_log_probs(port, logits, ids, temperature)
        return jnp.sum(log_prob)

    return loss


def _transition_loss(port: Port, kind: str, index: int) -> Loss:
    levels, guidance = step_levels(port), dataclasses.replace(UNGUIDED, text_scale=4.0)
    level, following = levels[index], levels[index + 1]
    x = jnp.asarray(port.array(f"c9.step{index}_x"))
    sampled = jnp.asarray(stepping(port)[f"c9.step{index}_{kind}_next"])[None]
    noise = port.fixture.number(f"c9.step{index}_{kind}_std", r"noise_level ([\d.]+)")

    def loss(params: PolicyParams) -> jax.Array:
        contexts = port.drawing(params)
        v = port.guided_velocity(contexts, x, level, guidance, params=params)[None]
        if kind == "sde":
            mean, std = sde.sde_mean_std(x[None], v, level, following, levels[1], noise)
            return sde.sde_log_prob(sampled, mean, std, level, following)[0]
        mean, _ = sde.cps_mean_std(x[None], v, level, following, noise)
        return sde.cps_log_prob(sampled, mean)[0]

    return loss


class Layout:
    """The sequence of c14: [text, VAE block, ViT block, text, noised VAE block].

    `order[i]` is the position in the sequence of token i of our arrays, und tokens first.
    """

    def __init__(self, port: Port) -> None:
        """Builds positions, mask and order from the block lengths and attention modes."""
        lengths = [int(n) for n in port.array("c14.split_lens")]
        modes = port.fixture.texts["c14.attn_modes"].split()
        starts = np.concatenate([[0], np.cumsum(lengths)])
        blocks = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
        system, clean, vit, text, noised = blocks
        self.text_positions = text
        und = [system, clean[[0, -1]], vit, text, noised[[0, -1]]]
        self.order = np.concatenate([*und, clean[1:-1], noised[1:-1]])
        self.mask = sequence_mask(lengths, modes)
        self.positions = sequence_positions(lengths, modes)

    def to_sequence(self, tokens: Tokens) -> jax.Array:
        """Reorders [1, Tu, D] and [1, Tg, D] to [T, D] in the order of the sequence."""
        assert tokens.gen is not None
        joined = jnp.concatenate([tokens.und[0], tokens.gen[0]])
        return joined[np.argsort(self.order)]


def sequence_mask(lengths: list[int], modes: list[str]) -> np.ndarray:
    """Returns the attention mask of a training sequence, bool[T, T].

    Every block attends to the blocks before it and to itself, in "causal" blocks up to each token;
    nothing but itself attends to a "noise" block.
    """
    total = sum(lengths)
    block = np.repeat(np.arange(len(lengths)), lengths)
    causal = np.repeat([mode == "causal" for mode in modes], lengths)
    noise = np.repeat([mode == "noise" for mode in modes], lengths)
    index = np.arange(total)
    same_block = block[:, None] == block[None]
    past = block[None] < block[:, None]
    within = same_block & (~causal[:, None] | (index[None] <= index[:, None]))
    return within | (past & ~noise[None])


def sequence_positions(lengths: list[int], modes: list[str]) -> np.ndarray:
    """Returns RoPE ids int32[T]: one per text token, one per image block."""
    positions, rope = [], 0
    for length, mode in zip(lengths, modes, strict=True):
        steps = np.arange(length) if mode == "causal" else np.zeros(length, int)
        positions.append(rope + steps)
        rope += length if mode == "causal" else 1
    return np.concatenate(positions).astype(np.int32)


def training(port: Port) -> Outputs:
    """Recomputes c14: the official training forward in one pass, losses and gradients."""
    layout = Layout(port)

    def loss(params: PolicyParams) -> tuple[jax.Array, Outputs]:
        return _training_loss(port, layout, params)

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(port.params)
    mask = layout.mask.astype(np.int32)
    out |= {"c14.loss": value, "c14.attention_mask": mask}
    return out | named_gradients(port, "c14", grads.base)


def _training_loss(port: Port, layout: Layout, params: PolicyParams) -> tuple[jax.Array, Outputs]:
    grid, model = port.latent_grid(), port.model
    clean, target = patchify(
        jnp.asarray(port.array("c14.padded_latent").transpose(0, 2, 3, 1)),
        port.config.latent_patch_size,
    )
    noise = jnp.asarray(port.array("c14.noise"))[-len(target) :]
    sigma = float(port.array("c14.sigma"))
    x = (1.0 - sigma) * target + sigma * noise
    gen = policy.embed_latents(
        model, params, jnp.stack([clean, x]), jnp.array([0.0, sigma], jnp.float32), grid
    )
    patches, vit_grid = port.vit_patches()
    special = port.tokenizer.special
    words = port.ids_of("c7.instruction")

    def embed(ids: npt.ArrayLike) -> jax.Array:
        return policy.embed_text(model, params, jnp.asarray(ids, jnp.int32)[None])

    marks = embed([special.vision_start, special.vision_end])
    vit_tokens = policy.embed_patches(model, params, patches, vit_grid)
    vit = [marks[:, :1], vit_tokens, marks[:, 1:]]
    und = [embed(port.ids_of("c6.system")), marks, *vit, embed(words), marks]
    tokens = Tokens(jnp.concatenate(und, axis=1), gen.reshape(1, -1, gen.shape[-1]))
    order = layout.order
    hidden = policy.joint_forward(
        model,
        params,
        tokens,
        jnp.asarray(layout.positions[order])[None],
        jnp.asarray(layout.mask[np.ix_(order, order)])[None],
    )
    assert hidden.gen is not None
    pred = policy.read_velocity(model, params, hidden.gen[:, len(clean) :])[0]
    mse = jnp.square(pred - (noise - target))
    sequence = layout.to_sequence(hidden)
    logits = policy.text_logits(model, params, sequence[None, layout.text_positions[:-1]])[0]
    log_p = jax.nn.log_softmax(logits)
    ce = -jnp.take_along_axis(log_p, jnp.asarray(words[1:, None]), axis=1)[:, 0]
    out = {"c14.pred_v": pred, "c14.ce_logits": logits, "c14.mse": mse, "c14.ce": ce, "c14.x_t": x}
    return mse.mean() + ce.mean(), out
