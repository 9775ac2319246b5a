"""Pretrains the small UMM of the shapes world on two CPU cores.

    python -m alphagrpo_jax.shapes.pretraining.train_vae --out runs/vae
    python -m alphagrpo_jax.shapes.pretraining.train_vae --out runs/vae2 --start runs/vae \\
      --latent-noise 0.15
    python -m alphagrpo_jax.shapes.pretraining.pretrain --vae runs/vae2 --out runs/umm

The three commands train the autoencoder, train its decoder again on noised latents, and train the
decoder and the vision encoder of the UMM, which took 85 minutes on two cores shared with other
work. The first two have not been run in this form: an earlier revision made the shipped
autoencoder, see the model's card.

One model learns to generate images (with and without a think text), to caption and answer, to
edit, and to name and repair the flaws of an image. The objective is BAGEL's: cross-entropy on texts
plus the flow-matching error on noised latents. It uses cached contexts, as inference does, where
BAGEL's own training packs a row into one sequence (`policy.joint_forward`, which `check_port`
compares with the official code); both give equal losses
(tests/shapes/pretraining/test_pretrain_loss.py).

Writes the official folder layout. Data, noise and learning rate depend on the seed and the step
alone: after an interruption (exit code 75) the same command continues, bit for bit.
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
from collections.abc import Callable, Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tqdm
from flax import struct

from alphagrpo_jax import tasks
from alphagrpo_jax.models import bagel_weights
from alphagrpo_jax.runtime import checkpoint, cli
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import read_rows
from alphagrpo_jax.runtime.paths import existing_file
from alphagrpo_jax.runtime.stopping import StopFlag
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes.pretraining import resumable
from alphagrpo_jax.shapes.pretraining.batches import BatchSizes, make_batch
from alphagrpo_jax.shapes.pretraining.pretrain_loss import SIDE, Recipe, pretraining_loss
from alphagrpo_jax.shapes.pretraining.tokenizer_build import build_tokenizer

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
EMA_DECAY = 0.999
CHECKPOINT_SECONDS = 180.0
LOG_EVERY, AHEAD = 20, 4  # steps
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOG = "pretraining.jsonl"
VAE_FILES = (bagel_weights.AE, bagel_weights.VAE_FILE)
RUN_FILES = (checkpoint.FOLDER, LOG, "README.md")  # in a model's folder, but not the model


@struct.dataclass
class PretrainState:
    """The train state that a checkpoint stores."""

    params: dict
    average: dict  # exponential moving average of the parameters
    opt_state: optax.OptState
    step: jax.Array  # int32[]


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("model", "recipe"))
def train_step(state: PretrainState, frozen, batch, prompts, scale, key, *, model, recipe: Recipe):
    """Computes one update.

    Args:
      state: donated.
      frozen: the autoencoder's parameters.
      batch: from `batches.make_batch`.
      prompts: tokens and mask of the system prompts.
      scale: float32[], the learning-rate schedule's factor in (0, 1].
      key: typed key; the step is folded in.
      model, recipe: static.
    Returns:
      The new state and the metrics.
    """
    grads, metrics = jax.grad(pretraining_loss, has_aux=True)(
        state.params, frozen, model, batch, prompts, jax.random.fold_in(key, state.step), recipe
    )
    updates, opt_state = optimizer(recipe).update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: scale * u, updates)
    params: dict = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
    decay = jnp.minimum(EMA_DECAY, (state.step + 1) / (state.step + 10))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return PretrainState(params, average, opt_state, state.step + 1), metrics


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Builds Muon for the decoder's matrices (stacked over layers), AdamW for everything else."""

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
            muon_weight_dimension_numbers=matrices,  # pyright: ignore[reportArgumentType]
            consistent_rms=0.2,
        ),
    )


def schedule(step: int, steps: int) -> float:
    """Computes the factor of the learning rate.

    Warm-up over 100 steps, then flat, then linear to 2 % over the last 60 % of the steps.
    """
    return min(1.0, (step + 1) / 100) * max(0.02, min(1.0, (1 - step / steps) / 0.6))


def write_start_model(
    out: pathlib.Path, vae_folder: pathlib.Path, seed: int, start: pathlib.Path | None
) -> None:
    """Writes the model that training starts from: a copy of `start`, or random weights."""
    if start is not None:
        existing_file(start / bagel_weights.EMA, "--start names the folder of a model")
        shutil.copytree(start, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*RUN_FILES))
        return
    build_tokenizer(out)
    tokenizer = Tokenizer.from_folder(out)
    vae = json.loads((vae_folder / bagel_weights.VAE_FILE).read_text())
    llm = {**LLM, "vocab_size": len(tokenizer)}
    random = bagel_weights.new_model(
        jax.random.key(seed), tokenizer, llm=llm, vit=VIT, vae=vae, bagel=BAGEL
    )
    bagel_weights.save_model(out, random, dtype="bfloat16")


def prefetch_batches(make: Callable[[int], dict], steps: range) -> Generator[dict, None, None]:
    """Yields the batches of these steps, which a helper process makes a few steps ahead."""
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
    """Trains from the latest checkpoint of the run in `out`; returns the exit code.

    Args:
      out: folder of the run and of the model.
      vae_folder: folder of the autoencoder, which is copied into the model.
      steps: updates in all; the learning rate's schedule spans them.
      seed: of weights, data and noise.
      start: folder of a model to start from.
      recipe: of objective and optimizer; None: the defaults.
      sizes: of a batch; None: the defaults.
      stopped: called after every update; when it returns True, the run saves and ends.
    Raises:
      InputError: the run in `out` has other options.
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
        write_start_model(out, vae_folder, seed, start)
    for name in VAE_FILES:
        shutil.copy(vae_folder / name, out)
    loaded = bagel_weights.load_model(out)
    params = dict(loaded.base)
    frozen = params.pop("vae")
    state = _initial_state(params, recipe)
    state = saves.state(step, state) if step else state
    # A restored state must be placed like a new one, or the update is compiled a second time.
    state = jax.device_put(state, jax.devices()[0])
    system_prompts = (tasks.THINK_SYSTEM_PROMPT, tasks.ANSWER_SYSTEM_PROMPT)
    prompts = _encode_prompts(loaded.tokenizer, system_prompts)
    update = functools.partial(train_step, model=loaded.model, recipe=recipe)
    key, last_save = jax.random.key(seed + 1), spent

    def save() -> None:
        if saves.latest() != step:
            saves.save(step, state, {"spent": spent, "options": options})
        bagel_weights.save_model(out, loaded, base={**state.average, "vae": frozen})

    log = out / LOG
    _truncate_log(log, step)
    make = functools.partial(make_batch, loaded.tokenizer, sizes, seed)
    with (
        contextlib.closing(prefetch_batches(make, range(step, steps))) as batches,
        tqdm.tqdm(total=steps, initial=step, unit="step") as bar,
    ):
        start_time = time.monotonic() - spent
        for batch in batches:
            scale = jnp.float32(schedule(step, steps))
            state, metrics = update(state, frozen, batch, prompts, scale, key)
            row = {name: round(float(value), 5) for name, value in metrics.items()}
            step, spent = step + 1, time.monotonic() - start_time
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()}, refresh=False)
            if step % LOG_EVERY == 0:
                _append_row(log, {"step": step, "spent": round(spent, 1), **row})
            if stopped():
                break
            if spent - last_save > CHECKPOINT_SECONDS:
                last_save = spent
                save()
    save()
    saves.close()
    return cli.DONE if step == steps else cli.STOPPED


def _append_row(log: pathlib.Path, row: dict) -> None:
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _initial_state(params: dict, recipe: Recipe) -> PretrainState:
    average = jax.tree.map(jnp.copy, params)
    opt_state = optimizer(recipe).init(params)
    return PretrainState(params, average, opt_state, jnp.zeros((), jnp.int32))


def _truncate_log(log: pathlib.Path, step: int) -> None:
    """Drops the rows of later steps, whose updates were lost with their checkpoint."""
    rows = [row for row in read_rows(log) if row["step"] <= step]
    replace_text(log, "".join(json.dumps(row) + "\n" for row in rows))


def _digest(vae_folder: pathlib.Path) -> str:
    hint = "train_vae writes it into the folder that --vae names"
    paths = [existing_file(vae_folder / name, hint) for name in VAE_FILES]
    content = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()[:16]


def _encode_prompts(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes system prompts: tokens int32[N, T] and mask bool[N, T]."""
    special = tokenizer.special
    rows = [[special.im_start, *tokenizer.encode(text), special.im_end] for text in texts]
    mask = np.arange(max(map(len, rows)))[None] < np.array([[len(row)] for row in rows])
    tokens = np.full(mask.shape, tokenizer.pad, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vae", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=cli.COUNT, default=2000)
    parser.add_argument("--seed", type=cli.SEED, default=0)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--start", type=pathlib.Path, help="folder of a model to go on from")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains as the flags say; returns the exit code."""
    stop = StopFlag()
    code = train(
        options.out,
        options.vae,
        steps=options.steps,
        seed=options.seed,
        start=options.start,
        recipe=Recipe(options.learning_rate),
        stopped=lambda: stop.requested,
    )
    if code == cli.STOPPED:
        tqdm.tqdm.write("stopped; the same command continues", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
