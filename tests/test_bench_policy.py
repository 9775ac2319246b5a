"""Speed of the policy's functions: what is counted, and the command on a tiny model."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
import tiny_world

from alphagrpo_jax import bench_policy, policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.bagel_config import BagelConfig

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


def test_operations_are_those_that_the_compiler_counts():
    """One layer: the compiler counts the body of a loop once."""
    llm = tiny_world.LLM | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    tokens = tiny_world.tokenizer().special
    bagel = tiny_world.BAGEL | {"max_latent_size": 8}
    fields = {"vit": tiny_world.VIT, "vae": tiny_world.VAE, "bagel": bagel}
    config = BagelConfig.from_dicts(llm=llm | {"vocab_size": 300}, **fields, tokens=tokens)
    model = Bagel(config)
    params = policy.PolicyParams(base=bench_policy.random_params(model, 0).base)
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
    expected = bench_policy.decoder_flops(config, rows, x.shape[1], context)
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)


def test_the_command(tmp_path, capsys):
    folder, out = tiny_world.write_model(tmp_path / "model"), tmp_path / "figures.json"
    assert bench_policy.main([f"--sizes={folder}", *SMALL, f"--out={out}"]) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    for name in NAMES:
        assert name in printed
        assert figures[f"{name}/seconds"] > 0.0
        rate = figures[f"{name}/per_second"] * figures[f"{name}/seconds"]
        assert rate == pytest.approx({"prefill": 8, "draw": 4}.get(name, rate))
    assert figures["write text/bytes_per_second"] > 0.0
    assert "decode pixels/flops_per_second" not in figures  # not counted
    share = figures["draw/flops_per_second"] / figures["ceiling/flops_per_second"]
    assert figures["draw/flops_share"] == pytest.approx(share)


def test_some_functions_alone(tmp_path, capsys):
    folder = tiny_world.write_model(tmp_path / "model")
    assert bench_policy.main([f"--sizes={folder}", *SMALL, "--only=pre", "--unroll=2"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in NAMES if name in printed] == ["prefill"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "needs an accelerator"),
        (("--sizes=nowhere",), 1, "nowhere"),
        (("--sizes=package:umm", "--points=1"), 2, "--points at least 2"),
    ],
)
def test_wrong_usage(arguments, code, message, capsys):
    try:
        got = bench_policy.main(arguments)
    except SystemExit as error:
        got = error.code
    assert got == code
    assert message in capsys.readouterr().err
