"""The PyTorch implementation computes what ours does, at tiny sizes; the command compares both."""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
import torch
from flax import traverse_util

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.sampling.text import text_log_probs
from benchmarks import torch_peer, torch_policy, torch_training
from benchmarks.torch_bagel import TorchBagel
from benchmarks.torch_equality import gradient_difference, largest, tensor
from benchmarks.torch_layers import Past
from benchmarks.torch_policy import TextLengths, TorchTexts

pytestmark = pytest.mark.torch

GRID = (2, 2)
SIGMAS = (0.8, 0.5)


class Inputs(NamedTuple):
    """Two rows: prompts and texts of different lengths, and two noisy versions of an image."""

    prompt: np.ndarray  # int32[2, 5]
    prompt_mask: np.ndarray
    text: np.ndarray  # int32[2, 6]
    text_mask: np.ndarray
    x: np.ndarray  # float32[2, 2, M, C]


class Outputs(NamedTuple):
    """Log-probs, entropies, velocities of both versions, and pixels."""

    log_prob: Any
    entropy: Any
    velocity: Any
    pixels: Any


@pytest.fixture(scope="module")
def loaded():
    return tiny_world.model()


@pytest.fixture(scope="module")
def params(loaded) -> PolicyParams:
    """With adapters whose second matrices are not zero."""
    rng = np.random.default_rng(0)
    shapes = traverse_util.flatten_dict(
        jax.eval_shape(lambda: lora.init(jax.random.key(0), loaded.base, lora.TARGETS, 4))
    )
    adapters = {
        path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in shapes.items()
    }
    return PolicyParams(loaded.base, traverse_util.unflatten_dict(adapters), 2.0)


@pytest.fixture(scope="module")
def model(loaded, params) -> TorchBagel:
    return TorchBagel(loaded.config, params)


@pytest.fixture(scope="module")
def inputs(loaded) -> Inputs:
    rng = np.random.default_rng(1)
    vocabulary = loaded.config.llm.vocab_size
    prompt = rng.integers(0, vocabulary, (2, 5)).astype(np.int32)
    text = rng.integers(0, vocabulary, (2, 6)).astype(np.int32)
    x = rng.normal(size=(2, 2, 4, loaded.config.latent_width)).astype(np.float32)
    lengths = np.array([[5, 3], [4, 6]])
    masks = (np.arange(x)[None] < row[:, None] for x, row in zip((5, 6), lengths, strict=True))
    prompt_mask, text_mask = masks
    return Inputs(prompt, prompt_mask, text, text_mask, x)


def our_outputs(model, adapters, params: PolicyParams, inputs: Inputs) -> Outputs:
    params = PolicyParams(params.base, adapters, params.lora_scale)
    prompt, _ = policy.extend_text(model, params, kv_cache.empty(2), *inputs[:2])
    prompt = kv_cache.stop_gradient(prompt)
    scores = text_log_probs(model, params, prompt, *inputs[2:4], temperature=0.9)
    ctx, _ = policy.extend_text(model, params, prompt, *inputs[2:4])
    sigma = jnp.broadcast_to(jnp.asarray(SIGMAS), (2, 2))
    v = policy.packed_velocity(model, params, jax.lax.stop_gradient(ctx), inputs.x, sigma, GRID)
    pixels = policy.decode_latents(model, params, inputs.x[:, 0], GRID)
    return Outputs(scores.log_prob, scores.entropy, v, pixels)


def their_outputs(model: TorchBagel, inputs: Inputs) -> Outputs:
    prompt, prompt_mask, text, text_mask, x = (torch.from_numpy(array) for array in inputs)
    with torch.no_grad():
        before = torch_policy.extend_text(model, model.empty(2), prompt.long(), prompt_mask)
        ctx = torch_policy.extend_text(model, before, text.long(), text_mask)
    texts = TorchTexts(text.long(), torch.zeros(2, 5), text_mask, text_mask[:, 1:])
    scores = torch_policy.text_log_probs(model, before, texts, temperature=0.9)
    past = Past(ctx.keys, ctx.values, None)
    version = torch.tensor([0, 0, 1, 1, *[0] * 4, *[1] * 4])
    among = (version[:, None] == version).expand(2, -1, -1)
    visible = torch.cat([ctx.valid[:, None].expand(-1, len(version), -1), among], 2)
    v = model.velocity(x, torch.tensor(SIGMAS), ctx.rope, past, model.additive_mask(visible), GRID)
    return Outputs(*scores, v, model.decode_pixels(x[:, 0], GRID))


def test_log_probs_velocities_and_pixels_are_ours(loaded, params, model, inputs):
    function = jax.jit(functools.partial(our_outputs, loaded.model))
    ours = function(params.lora, params, inputs)
    theirs = their_outputs(model, inputs)
    for name, expected, values in zip(Outputs._fields, ours, theirs, strict=True):
        assert largest(tensor(expected), values) < 1e-5, name


def test_gradients_are_ours(loaded, params, model, inputs):
    def total(adapters, params, inputs):
        outputs = our_outputs(loaded.model, adapters, params, inputs)
        return outputs.log_prob.sum() + jnp.square(outputs.velocity).sum()

    gradient = jax.jit(jax.grad(total))(params.lora, params, inputs)
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, gradient), sep="/")
    theirs = their_outputs(model, inputs)
    (theirs.log_prob.sum() + theirs.velocity.square().sum()).backward()
    peer = {
        (path, layer, name): parameter.grad
        for path, layer, module in model.adapted()
        for name, parameter in module.named_parameters()
    }
    assert gradient_difference(flat, peer) < 1e-5


@torch.no_grad()
def test_texts_have_the_lengths_they_are_told_and_the_log_probs_of_the_update(model, inputs):
    prompt, mask = (torch.from_numpy(array) for array in inputs[:2])
    ctx = torch_policy.extend_text(model, model.empty(2), prompt.long(), mask)
    lengths = TextLengths(torch.tensor([4, 6]), torch.tensor([3, 4]))  # the second one is truncated
    room = ctx.repeated(1, room=6)
    texts = torch_policy.write_text(model, room, ctx.length, lengths, temperature=0.9)
    ids = model.config.tokens
    assert texts.tokens[:, 0].tolist() == [ids.im_start] * 2
    assert [int(texts.tokens[0, 3]), int(texts.tokens[1, 5])] == [ids.im_end] * 2
    assert texts.mask.sum(1).tolist() == [4, 6]
    assert texts.scored.sum(1).tolist() == [3, 4]
    log_prob, _ = torch_policy.text_log_probs(model, ctx, texts, temperature=0.9)
    assert largest(texts.log_prob, log_prob) < 1e-5
    again = torch_policy.extend_text(model, ctx, texts.tokens, texts.mask)
    behind = torch_policy.end_text(room, ctx.length, texts)
    valid = behind.valid
    assert torch.equal(valid, again.valid)
    gap = (behind.keys - again.keys)[:, valid[:, None].expand(-1, 2, -1)].abs().max()
    assert gap < 1e-5


@pytest.mark.slow
def test_a_training_step_is_ours(tmp_path):
    """Two groups of four trajectories in two micro-batches; then a step of both."""
    root = tiny_world.write_all(tmp_path)
    fields = tiny_world.config(root)
    fields.rollout.guidance.text_scale = 1.0
    fields.rollout.shared_noise = True
    config = config_lib.from_config_dict(fields)
    comparison = torch_peer.Comparison(config, root, compiled=False)
    figures = comparison.check(print)
    assert len(figures) == 7
    assert max(figures.values()) < 2e-5
    peer = comparison.peers["eager"]
    before = [parameter.detach().clone() for parameter in peer.parameters]
    seconds = comparison.round(1, 3)
    assert seconds.keys() == {"ours", "eager"}
    assert all(min(times) > 0 for times in seconds.values())
    assert all(torch.equal(x, y) for x, y in zip(peer.parameters, before, strict=True))


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = tmp_path / "figures.json"
    flags = ["--rows=12", "--repeats=1", "--no-compile", "--parts=rollout,log-probs"]
    assert torch_peer.main([*flags, f"--out={out}"]) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "| rollout |" in printed
    assert "update" not in printed.splitlines()[-1]
    for name in ("ours", "eager"):
        assert figures[f"seconds/{name}/rollout"] > 0
    assert figures["difference/eager/adapter gradients"] < torch_peer.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_single_functions_of_a_model_with_random_weights(dtype, tmp_path, capsys):
    folder, out = tiny_world.write_model(tmp_path / "model"), tmp_path / "figures.json"
    flags = ["--side=32", "--prompt=4", "--text=3", "--points=3", "--rows=2", "--repeats=1"]
    flags += [f"--sizes={folder}", f"--dtype={dtype}", "--no-compile", f"--out={out}"]
    assert torch_peer.main(flags) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    for part in ("text token", "drawing step", "update"):
        assert figures[f"seconds/eager/{part}"] > 0
        assert f"{part}: ours" in printed


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--parts=rollout,lunch",), 2, "got ['lunch'], expected some of rollout"),
        (("--device=cuda",), 2, "goes with --sizes"),
        (("--rows=7",), 2, "--rows=7 must be a multiple of 12"),
        (("--sizes=7b", "--device=cuda"), 1, "JAX uses cpu"),
        (("--sizes=package:umm", "--side=50"), 1, "--side=50 must be a multiple of 16"),
    ],
)
def test_wrong_usage(flags, code, message, capsys):
    try:
        exit_code = torch_peer.main(flags)
    except SystemExit as error:
        exit_code = error.code
    assert exit_code == code
    assert message in capsys.readouterr().err


def test_what_the_default_does_not_do_is_refused():
    config = config_lib.change_options(config_lib.read_config(), {"loss.text_beta": 0.1})
    with pytest.raises(config_lib.ConfigError, match="text_beta"):
        torch_training.check_options(config)
