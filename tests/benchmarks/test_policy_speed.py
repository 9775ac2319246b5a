"""Speed of the policy's functions: what is counted, and the command on a tiny model."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
import tiny_world

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.bagel_7b import bagel_7b_config
from alphagrpo_jax.models.bagel_config import BagelConfig
from benchmarks import policy_speed

NAMES = (
    "prefill",
    "write text",
    "draw",
    "decode pixels",
    "gradient of a text's log-probs",
    "gradient of an image step's log-prob",
)
SMALL = (
    "--rows=2",
    "--side=32",
    "--prompt=4",
    "--text=3",
    "--points=3",
    "--dtype=float32",
    "--repeat=1",
)


@pytest.mark.slow
def test_operations_are_those_that_the_compiler_counts():
    """One layer: the compiler counts the body of a loop once."""
    llm = tiny_world.LLM | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    tokens = tiny_world.tokenizer().special
    bagel = tiny_world.BAGEL | {"max_latent_size": 8}
    fields = {"vit": tiny_world.VIT, "vae": tiny_world.VAE, "bagel": bagel}
    config = BagelConfig.from_dicts(llm=llm | {"vocab_size": 300}, **fields, tokens=tokens)
    model = Bagel(config)
    params = policy.PolicyParams(base=policy_speed.random_params(model, 0).base)
    rows, grid, context = 2, (8, 8), 16
    x = jnp.zeros((rows, grid[0] * grid[1], config.latent_width))
    ctx, _ = policy.extend_text(
        model,
        params,
        kv_cache.empty(rows),
        jnp.zeros((rows, context), jnp.int32),
        jnp.ones((rows, context), bool),
    )
    flow = jax.jit(functools.partial(policy.velocity, model, grid=grid))
    compiled = flow.lower(params, ctx, x, jnp.ones((rows,))).compile()
    expected = policy_speed.decoder_flops(config, rows, x.shape[1], context)
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)


def test_operations_and_bytes_of_bagel():
    """28 layers of 4 * 3584^2 * (1 + 1/7) / 2 + 3 * 3584 * 18944 weights, counted by hand."""
    model = Bagel(bagel_7b_config(tiny_world.tokenizer()), jnp.bfloat16)
    weights, head = 6525288448, 3584 * 152064
    assert policy_speed.layer_weights(model.config) == weights
    single = policy_speed.decoder_flops(model.config, rows=1, tokens=1, context=0)
    assert single == 2 * weights + 28 * 4 * 3584
    batch = policy_speed.decoder_flops(model.config, rows=3, tokens=5, context=7)
    assert batch == 3 * 5 * (2 * weights + 28 * 4 * 3584 * 12)
    sizes = policy_speed.Sizes(rows=2, side=32, prompt=4, text=3, points=3)
    written = policy_speed.text_work(model, sizes)
    assert written.flops == 6 * (2 * weights + 28 * 4 * 3584 * 7 + 2 * head)
    assert written.bytes == 3 * 2 * (weights + head + 2 * 7 * 4 * 128 * 28 * 2)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    folder, out = tiny_world.write_model(tmp_path / "model"), tmp_path / "figures.json"
    assert policy_speed.main([f"--sizes={folder}", *SMALL, f"--out={out}"]) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    for name in NAMES:
        assert name in printed
        assert figures[f"{name}/seconds"] > 0.0
    counts = [figures[f"{name}/per_second"] * figures[f"{name}/seconds"] for name in NAMES]
    assert counts == pytest.approx([8, 6, 4, 2, 6, 2])  # tokens, tokens, image steps, images, ...
    assert "decode pixels/flops_per_second" not in figures  # not counted
    share = figures["draw/flops_per_second"] / figures["ceiling/flops_per_second"]
    assert figures["draw/flops_share"] == pytest.approx(share)


@pytest.mark.slow
def test_some_functions_alone(tmp_path, capsys):
    folder = tiny_world.write_model(tmp_path / "model")
    assert policy_speed.main([f"--sizes={folder}", *SMALL, "--only=pre", "--unroll=2"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in NAMES if name in printed] == ["prefill"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "needs an accelerator"),
        (("--sizes=nowhere",), 1, "nowhere"),
        (("--sizes=package:umm", "--points=1"), 2, "--points must be at least 2"),
        (("--sizes=package:umm", "--side=50"), 1, "--side=50 must be a multiple of 16"),
    ],
)
def test_wrong_usage(arguments, code, message, capsys):
    try:
        got = policy_speed.main(arguments)
    except SystemExit as error:
        got = error.code
    assert got == code
    assert message in capsys.readouterr().err
