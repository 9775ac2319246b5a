"""Pretrains the small UMM of the shapes world on two CPU cores.

    python -m alphagrpo_jax.shapes.train_vae --out runs/vae
    python -m alphagrpo_jax.shapes.train_vae --out runs/vae2 --start runs/vae --latent_noise 0.15
    python -m alphagrpo_jax.shapes.pretrain --vae runs/vae2 --out runs/umm

This sequence makes the model: the autoencoder, its decoder once more on noised latents, then the
rest. Estimate for two idle cores, not measured: 70 minutes for the first two, 90 for the third.

One model learns to draw (with and without a think text), to caption and answer, to edit, and to
say what is wrong with an image and repair it. The objective is BAGEL's: cross-entropy on texts
plus the flow-matching error on noised latents, in the contexts that inference uses. Writes the
official folder layout. Data, noise and learning rate depend on the seed and the step alone:
interrupted (exit code 75), the same command continues, bit for bit.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tqdm
from flax import struct

from alphagrpo_jax import policy, tasks
from alphagrpo_jax.models import bagel_weights, kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime import checkpoint
from alphagrpo_jax.runtime.metrics import read_rows, replace_text
from alphagrpo_jax.runtime.stopping import StopFlag
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes import resumable, scenes
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
LOG_EVERY, AHEAD = 20, 4  # steps
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOG = "pretraining.jsonl"
VAE_FILES = (bagel_weights.AE, bagel_weights.VAE_FILE)
OF_A_RUN = (checkpoint.FOLDER, LOG, "README.md")  # in a model's folder, but not the model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of the objective and the optimiser."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    text_weight: float = 0.25  # of the cross-entropy, beside the flow-matching error
    look_weight: float = 0.25  # of the loss that ties what the encoder sees to words
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


def look_loss(model: Bagel, params: PolicyParams, batch: dict) -> jax.Array:
    """Negative log-likelihood, nats, of the words for what each patch shows.

    A patch's vector, as the decoder reads it, is to point at the embeddings of its two words:
    `-mean log softmax(15 cos(patch, embeddings))[word]`. With answers and captions alone the
    encoder stays blind for most of a pretraining of this length.
    """
    patches = patchify(_pixels(batch["source"]), model.config.vit.patch_size)
    seen = policy.embed_patches(model, params, patches, model.config.vit_grid(SIDE, SIDE))
    every = jnp.arange(model.config.llm.vocab_size)
    table = jax.lax.stop_gradient(policy.embed_text(model, params, every))
    cosines = jnp.einsum("bmd,vd->bmv", _unit(seen), _unit(table))
    log_probs = jax.nn.log_softmax(15.0 * cosines)
    return -jnp.mean(jnp.take_along_axis(log_probs, batch["words"], axis=-1))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


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

    ctx = _system(systems, batch["plan"]["system"])
    _, plan_text = write_texts(model, params, ctx, batch["plan"])

    seen = see(model, params, systems, batch, sources)
    repairs, rows = batch["reflect"]["tokens"].shape[0], batch["source"].shape[0]
    ctx, reflect_text = write_texts(model, params, _rows(seen, 0, repairs), batch["reflect"])
    reflect_flow = flow_error(model, params, ctx, wanted[:repairs], keys[1], recipe.few_draws)
    ctx, short_text = write_texts(model, params, _rows(seen, repairs, rows), batch["short"])
    ctx = _rows(ctx, 0, targets - repairs)
    edit_flow = flow_error(model, params, ctx, wanted[repairs:], keys[2], recipe.few_draws)

    look = look_loss(model, params, batch)

    metrics = {
        "look": look,
        "text/draw": draw_text,
        "text/plan": plan_text,
        "text/reflect": reflect_text,
        "text/short": short_text,
        "flow/draw": draw_flow,
        "flow/reflect": reflect_flow,
        "flow/edit": edit_flow,
    }
    flow = 0.7 * draw_flow + 0.15 * reflect_flow + 0.15 * edit_flow
    text = 0.5 * draw_text + 0.5 * plan_text + 0.25 * reflect_text + 0.5 * short_text
    return flow + recipe.text_weight * text + recipe.look_weight * look, metrics


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("model", "recipe"))
def train_step(state: State, frozen, batch, prompts, scale, key, *, model, recipe: Recipe):
    """One update; `scale` in (0, 1] is the learning-rate schedule's factor."""
    grads, metrics = jax.grad(loss_of, has_aux=True)(
        state.params, frozen, model, batch, prompts, jax.random.fold_in(key, state.step), recipe
    )
    updates, opt_state = optimizer(recipe).update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: scale * u, updates)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(EMA_DECAY, (state.step + 1) / (state.step + 10))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    metrics["grad_norm"] = optax.tree.norm(grads)
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


def schedule(step: int, steps: int) -> float:
    """Warm-up over 100 steps, then flat, then linear to 2 % over the last 60 % of the steps."""
    return min(1.0, (step + 1) / 100) * max(0.02, min(1.0, (1 - step / steps) / 0.6))


def begin(
    out: pathlib.Path, vae_folder: pathlib.Path, seed: int, start: pathlib.Path | None
) -> None:
    """Writes the model that training begins with: that of `start`, else random weights."""
    if start is not None:
        shutil.copytree(start, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*OF_A_RUN))
        return
    build_tokenizer(out)
    tokenizer = Tokenizer.from_folder(out)
    vae = json.loads((vae_folder / bagel_weights.VAE_FILE).read_text())
    llm = {**LLM, "vocab_size": len(tokenizer)}
    random = bagel_weights.new_model(
        jax.random.key(seed), tokenizer, llm=llm, vit=VIT, vae=vae, bagel=BAGEL
    )
    bagel_weights.save_model(out, random, dtype="bfloat16")


def ahead(make: Callable[[int], dict], steps: range) -> Iterator[dict]:
    """Batches of these steps, made by a helper process a few steps ahead."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as helper:
        # The helper inherits the mask: signals to stop are for this process alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        queue = [helper.submit(make, step) for step in steps[:AHEAD]]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for step in steps:
            batch = queue.pop(0).result()
            if step + AHEAD in steps:
                queue.append(helper.submit(make, step + AHEAD))
            yield batch


def train(
    out: pathlib.Path,
    vae_folder: pathlib.Path,
    *,
    steps: int,
    seed: int,
    start: pathlib.Path | None = None,
    recipe: Recipe | None = None,
    sizes: BatchSizes | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Trains from where the run in `out` stands; returns the exit code.

    Args:
      out: folder of the run and of the model.
      vae_folder: its autoencoder becomes the model's.
      steps: updates in all; the learning rate's schedule spans them.
      seed: of weights, data and noise.
      start: folder of a model to go on from.
      recipe, sizes: of objective and optimiser, and of a batch; None: the defaults.
      stopped: asked after every update; when true, the run saves and ends.
    Raises:
      ValueError: the run in `out` has other options.
    """
    recipe, sizes = recipe or Recipe(), sizes or BatchSizes()
    options = {"seed": seed, "steps": steps, "vae": _digest(vae_folder), "start": str(start)}
    options |= dataclasses.asdict(sizes) | dataclasses.asdict(recipe)
    saves = checkpoint.Checkpoints(out, keep=1)
    step, spent = saves.latest() or 0, 0.0
    if step:
        progress = saves.progress(step)
        resumable.check_options(progress.get("options", {}), options, out)
        spent = progress["spent"]
    else:
        begin(out, vae_folder, seed, start)
    for name in VAE_FILES:
        shutil.copy(vae_folder / name, out)
    loaded = bagel_weights.load_model(out)
    params = dict(loaded.base)
    frozen = params.pop("vae")
    average = jax.tree.map(jnp.copy, params)
    state = State(params, average, optimizer(recipe).init(params), jnp.zeros((), jnp.int32))
    state = saves.state(step, state) if step else state
    state = jax.device_put(state, jax.devices()[0])  # new or restored: one and the same program
    prompts = _prompts(loaded.tokenizer, (tasks.THINK_SYSTEM_PROMPT, tasks.ANSWER_SYSTEM_PROMPT))
    update = functools.partial(train_step, model=loaded.model, recipe=recipe)
    key, last_save = jax.random.key(seed + 1), spent

    def save() -> None:
        if saves.latest() != step:
            saves.save(step, state, {"spent": spent, "options": options})
        bagel_weights.save_model(out, loaded, base={**state.average, "vae": frozen})

    log = out / LOG
    _keep_rows(log, step)
    make = functools.partial(make_batch, loaded.tokenizer, sizes, seed)
    with (
        contextlib.closing(ahead(make, range(step, steps))) as batches,
        tqdm.tqdm(total=steps, initial=step, unit="step") as bar,
    ):
        begun = time.monotonic() - spent
        for batch in batches:
            scale = jnp.float32(schedule(step, steps))
            state, metrics = update(state, frozen, batch, prompts, scale, key)
            row = {name: round(float(value), 5) for name, value in metrics.items()}
            step += 1
            spent = time.monotonic() - begun
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()}, refresh=False)
            if step % LOG_EVERY == 0:
                with log.open("a") as file:
                    file.write(json.dumps({"step": step, "spent": round(spent, 1), **row}) + "\n")
            if stopped():
                break
            if spent - last_save > CHECKPOINT_SECONDS:
                last_save = spent
                save()
    save()
    saves.close()
    return resumable.DONE if step == steps else resumable.STOPPED


def _keep_rows(log: pathlib.Path, step: int) -> None:
    # Drops the rows of later steps, which were done but lost with their checkpoint.
    rows = [row for row in read_rows(log) if row["step"] <= step]
    replace_text(log, "".join(json.dumps(row) + "\n" for row in rows))


def _digest(vae_folder: pathlib.Path) -> str:
    content = b"".join((vae_folder / name).read_bytes() for name in VAE_FILES)
    return hashlib.sha256(content).hexdigest()[:16]


def _prompts(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    special = tokenizer.special
    rows = [[special.im_start, *tokenizer.encode(text), special.im_end] for text in texts]
    mask = np.arange(max(map(len, rows)))[None] < np.array([[len(row)] for row in rows])
    tokens = np.full(mask.shape, tokenizer.pad, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--start", type=pathlib.Path, help="folder of a model to go on from")
    options, stop = vars(parser.parse_args()), StopFlag()
    out, vae, recipe = options.pop("out"), options.pop("vae"), Recipe(options.pop("learning_rate"))
    try:
        code = train(out, vae, **options, recipe=recipe, stopped=lambda: stop.requested)
    except (ValueError, FileNotFoundError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
    if code == resumable.STOPPED:
        tqdm.tqdm.write("stopped; the same command continues", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
