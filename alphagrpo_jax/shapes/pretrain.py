"""Pretrains the small UMM of the shapes world on two CPU cores.

    python -m alphagrpo_jax.shapes.train_vae --out runs/vae --minutes 15
    python -m alphagrpo_jax.shapes.pretrain --vae runs/vae --out runs/umm --minutes 60

One model learns to draw (with and without a think text), to caption and answer, to edit, and to
say what is wrong with an image and repair it. The objective is BAGEL's: cross-entropy on texts
plus the flow-matching error on noised latents, in the contexts that inference uses. Writes the
official folder layout. Interrupted, the same command continues from its last checkpoint.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import tqdm
from flax import struct

from alphagrpo_jax import policy, tasks
from alphagrpo_jax.models import bagel_weights, kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.batches import BatchSizes, make_batch
from alphagrpo_jax.shapes.tokenizer_build import build_tokenizer

SIDE = scenes.RESOLUTION
LLM = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "qk_norm": True,
    "layer_module": "Qwen2MoTDecoderLayer",
}
VIT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 16,
    "image_size": SIDE,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
BAGEL = {
    "latent_patch_size": 2,
    "max_latent_size": 3,
    "vit_max_num_patch_per_side": SIDE // VIT["patch_size"],
    "connector_act": "gelu_pytorch_tanh",
    "interpolate_pos": False,
    "timestep_shift": 2.0,
    "visual_gen": True,
    "visual_und": True,
    "vae_transform": {"max": SIDE, "min": SIDE, "stride": 16},
    "vit_transform": {"max": SIDE, "min": SIDE, "stride": VIT["patch_size"]},
}
GRID = (3, 3)
EMA_DECAY = 0.999
CHECKPOINT_SECONDS = 180.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of the objective and the optimiser."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    text_weight: float = 0.25  # of the cross-entropy, beside the flow-matching error
    draws: int = 4  # noise levels per drawn image of the thinking kind
    few_draws: int = 2  # of the other kinds


@struct.dataclass
class State:
    """What a checkpoint holds."""

    params: dict
    average: dict
    opt_state: optax.OptState
    step: jax.Array  # int32[]


def _pixels(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1.0


def _system(systems: Context, which: jax.Array) -> Context:
    """Each row's system prompt: row `which - 1` of `systems`, or nothing where `which` is 0."""
    ctx = kv_cache.take(systems, jnp.maximum(which - 1, 0))
    (segment,) = ctx.segments
    present = which > 0
    segment = segment.replace(valid=segment.valid & present[:, None])
    return Context((segment,), jnp.where(present, ctx.rope, 0))


def _rows(ctx: Context, begin: int, end: int) -> Context:
    return kv_cache.take(ctx, jnp.arange(begin, end))


def write_texts(
    model: Bagel, params: PolicyParams, ctx: Context, texts: dict
) -> tuple[Context, jax.Array]:
    """Reads a group's texts in their contexts.

    Returns:
      The context that a drawing sees (visible tokens only), and the mean negative
      log-likelihood of the scored tokens, nats.
    """
    before = ctx.rope
    ctx, hidden = policy.extend_text(model, params, ctx, texts["tokens"], texts["mask"])
    logits = policy.text_logits(model, params, hidden[:, :-1])
    scores = policy.score_text(logits, texts["tokens"], texts["scored"], temperature=1.0)
    likelihood = -jnp.sum(scores.log_prob) / jnp.sum(scores.mask)
    *past, own = ctx.segments
    rope = before + jnp.sum(texts["visible"], axis=1, dtype=jnp.int32)
    return Context((*past, own.replace(valid=texts["visible"])), rope), likelihood


def flow_error(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    latents: jax.Array,
    key: jax.Array,
    draws: int,
) -> jax.Array:
    """Mean squared velocity error over `draws` noise levels per row.

    The levels are a shifted logit-normal: `s t / (1 + (s - 1) t)` of `t = sigmoid(N(0, 1))`, with
    the model's `timestep_shift` s, as in BAGEL's training forward.
    """
    x0 = jnp.repeat(latents[:, None], draws, axis=1)
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    t = jax.nn.sigmoid(jax.random.normal(level_key, x0.shape[:2]))
    shift = model.config.timestep_shift
    sigma = shift * t / (1 + (shift - 1) * t)
    level = sigma[:, :, None, None]
    x = (1 - level) * x0 + level * noise
    velocity = policy.velocity_draws(model, params, kv_cache.merge(ctx), x, sigma, GRID)
    return jnp.mean(jnp.square(velocity - (noise - x0)))


def see(
    model: Bagel, params: PolicyParams, systems: Context, batch: dict, latents: jax.Array
) -> Context:
    """[system][image] of the rows with an image; those that only understand skip its VAE block."""
    which = jnp.concatenate([batch["reflect"]["system"], batch["short"]["system"]])
    ctx = _system(systems, which)
    draws = jnp.arange(which.shape[0]) < batch["target"].shape[0]
    start = ctx.rope
    ctx = policy.extend_vae(model, params, ctx, latents, GRID)
    *past, block = ctx.segments
    block = block.replace(valid=block.valid & draws[:, None])
    ctx = Context((*past, block), jnp.where(draws, ctx.rope, start))
    patches = patchify(_pixels(batch["source"]), model.config.vit.patch_size)
    ctx = policy.extend_vit(model, params, ctx, patches, model.config.vit_grid(SIDE, SIDE))
    return kv_cache.merge(ctx)


def loss_of(
    trained: dict,
    frozen: dict,
    model: Bagel,
    batch: dict,
    prompts: tuple[jax.Array, jax.Array],
    key: jax.Array,
    recipe: Recipe,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The pretraining objective of one batch, and its parts."""
    params = PolicyParams({**trained, "vae": frozen})
    keys = jax.random.split(key, 3)
    systems, _ = policy.extend_text(model, params, kv_cache.empty(2), *prompts)
    images = jnp.concatenate([batch["draw_image"], batch["target"], batch["source"]])
    latents = jax.lax.stop_gradient(policy.encode_image(model, params, _pixels(images)))
    drawn, targets = batch["draw_image"].shape[0], batch["target"].shape[0]
    wanted, sources = latents[drawn : drawn + targets], latents[drawn + targets :]

    ctx = _system(systems, batch["draw"]["system"])
    ctx, draw_text = write_texts(model, params, ctx, batch["draw"])
    draw_flow = flow_error(model, params, ctx, latents[:drawn], keys[0], recipe.draws)

    seen = see(model, params, systems, batch, sources)
    repairs, rows = batch["reflect"]["tokens"].shape[0], batch["source"].shape[0]
    ctx, reflect_text = write_texts(model, params, _rows(seen, 0, repairs), batch["reflect"])
    reflect_flow = flow_error(model, params, ctx, wanted[:repairs], keys[1], recipe.few_draws)
    ctx, short_text = write_texts(model, params, _rows(seen, repairs, rows), batch["short"])
    ctx = _rows(ctx, 0, targets - repairs)
    edit_flow = flow_error(model, params, ctx, wanted[repairs:], keys[2], recipe.few_draws)

    metrics = {
        "text/draw": draw_text,
        "text/reflect": reflect_text,
        "text/short": short_text,
        "flow/draw": draw_flow,
        "flow/reflect": reflect_flow,
        "flow/edit": edit_flow,
    }
    flow = 0.7 * draw_flow + 0.15 * reflect_flow + 0.15 * edit_flow
    text = 0.5 * draw_text + 0.25 * reflect_text + 0.25 * short_text
    return flow + recipe.text_weight * text, metrics


def train_step(state: State, frozen, batch, prompts, scale, key, *, model, tx, recipe: Recipe):
    """One update; `scale` in (0, 1] is the learning-rate schedule's factor."""
    grads, metrics = jax.grad(loss_of, has_aux=True)(
        state.params, frozen, model, batch, prompts, jax.random.fold_in(key, state.step), recipe
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: scale * u, updates)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(EMA_DECAY, (state.step + 1) / (state.step + 10))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    metrics["grad_norm"] = optax.global_norm(grads)
    return State(params, average, opt_state, state.step + 1), metrics


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the decoder's matrices (stacked over layers), AdamW for everything else."""

    def matrices(params: dict) -> dict:
        def spec(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            inside = getattr(path[0], "key", None) == "language_model"
            return optax.contrib.MuonDimensionNumbers(1, 2) if inside and leaf.ndim == 3 else None

        return jax.tree_util.tree_map_with_path(spec, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
    )


def schedule(progress: float, step: int) -> float:
    """Warm-up over 100 steps, then flat, then linear to 2 % over the last 60 % of the time."""
    return min(1.0, (step + 1) / 100) * max(0.02, min(1.0, (1 - progress) / 0.6))


def build(
    out: pathlib.Path, vae_folder: pathlib.Path, seed: int, start: pathlib.Path | None
) -> bagel_weights.Loaded:
    """The model in `out`: what is there, else a copy of `start`, else random weights.

    Its autoencoder is always the one of `vae_folder`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / bagel_weights.EMA).exists():
        if start is None:
            _write_random(out, vae_folder, seed)
        else:
            shutil.copytree(start, out, dirs_exist_ok=True)
    for name in (bagel_weights.AE, bagel_weights.VAE_FILE):
        shutil.copy(vae_folder / name, out)
    return bagel_weights.load_model(out)


def _write_random(out: pathlib.Path, vae_folder: pathlib.Path, seed: int) -> None:
    build_tokenizer(out)
    tokenizer = Tokenizer.from_folder(out)
    vae = json.loads((vae_folder / bagel_weights.VAE_FILE).read_text())
    llm = {**LLM, "vocab_size": len(tokenizer)}
    random = bagel_weights.new_model(
        jax.random.key(seed), tokenizer, llm=llm, vit=VIT, vae=vae, bagel=BAGEL
    )
    bagel_weights.save_model(out, random, dtype="bfloat16")


def _batches(tokenizer_folder: str, sizes: BatchSizes, seed: int, step: int) -> dict:
    global _TOKENIZER  # one per helper process
    if _TOKENIZER is None:
        _TOKENIZER = Tokenizer.from_folder(tokenizer_folder)
    return make_batch(_TOKENIZER, sizes, seed, step)


_TOKENIZER: Tokenizer | None = None


def train(
    out: pathlib.Path,
    vae_folder: pathlib.Path,
    *,
    minutes: float,
    seed: int,
    start: pathlib.Path | None = None,
    recipe: Recipe | None = None,
    sizes: BatchSizes | None = None,
) -> None:
    """Trains until `minutes` of training time are spent; checkpoints and resumes."""
    recipe, sizes = recipe or Recipe(), sizes or BatchSizes()
    loaded = build(out, vae_folder, seed, start)
    model = loaded.model
    tx = optimizer(recipe)
    params = dict(loaded.base)
    frozen = params.pop("vae")
    average = jax.tree.map(jnp.copy, params)
    state = State(params, average, tx.init(params), jnp.zeros((), jnp.int32))
    spent = 0.0
    manager = ocp.CheckpointManager(
        (out / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    )
    if manager.latest_step() is not None:
        saved = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), progress=ocp.args.JsonRestore()
            ),
        )
        state, spent = saved["state"], saved["progress"]["spent"]
    prompts = _prompts(loaded.tokenizer, (tasks.THINK_SYSTEM_PROMPT, tasks.ANSWER_SYSTEM_PROMPT))
    step_fn = jax.jit(
        functools.partial(train_step, model=model, tx=tx, recipe=recipe), donate_argnums=0
    )
    key = jax.random.key(seed + 1)
    step, last_save = int(state.step), spent
    context = multiprocessing.get_context("spawn")
    make = functools.partial(_batches, str(out), sizes, seed)
    log = (out / "pretraining.jsonl").open("a")
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as helper,
        tqdm.tqdm(total=round(60 * minutes), initial=round(spent), unit="s") as bar,
    ):
        queue = [helper.submit(make, step + i) for i in range(4)]
        while spent < 60 * minutes:
            begin = time.monotonic()
            batch = queue.pop(0).result()
            queue.append(helper.submit(make, step + 4))
            scale = jnp.float32(schedule(spent / (60 * minutes), step))
            state, metrics = step_fn(state, frozen, batch, prompts, scale, key)
            row = {name: round(float(value), 5) for name, value in metrics.items()}
            step += 1
            spent += time.monotonic() - begin
            bar.update(int(spent) - bar.n)
            bar.set_postfix(step=step, **{k: f"{v:.3f}" for k, v in row.items()})
            if step % 20 == 0:
                log.write(json.dumps({"step": step, "spent": round(spent, 1), **row}) + "\n")
                log.flush()
            if spent - last_save > CHECKPOINT_SECONDS or spent >= 60 * minutes:
                last_save = spent
                _save(manager, out, loaded, state, step, spent)


def _prompts(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    special = tokenizer.special
    rows = [[special.im_start, *tokenizer.encode(text), special.im_end] for text in texts]
    mask = np.arange(max(map(len, rows)))[None] < np.array([[len(row)] for row in rows])
    tokens = np.full(mask.shape, tokenizer.pad, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def _save(
    manager: ocp.CheckpointManager,
    out: pathlib.Path,
    loaded: bagel_weights.Loaded,
    state: State,
    step: int,
    spent: float,
) -> None:
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave({"spent": spent})
        ),
    )
    manager.wait_until_finished()
    base = {**state.average, "vae": loaded.base["vae"]}
    bagel_weights.save_model(out, loaded, base=base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=pathlib.Path, help="folder of a model to go on from")
    args = parser.parse_args()
    train(args.out, args.vae, minutes=args.minutes, seed=args.seed, start=args.start)


if __name__ == "__main__":
    main()
