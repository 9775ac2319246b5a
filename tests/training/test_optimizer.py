"""Learning rates and steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from default_options import optimizer_options

from alphagrpo_jax.training import optimizer as optimizer_lib


def test_the_optimizer_by_hand():
    options = optimizer_options(**{
        "learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 0.0, "weight_decay": 0.0,
        "clip_norm": 1.0, "warmup_steps": 2, "decay_steps": 6, "gen_scale": 0.5,
    })  # fmt: skip
    optimizer = optimizer_lib.make_optimizer(options)
    trainable = {"q_proj": {"a": jnp.zeros(1)}, "q_proj_moe_gen": {"a": jnp.zeros(1)}}
    opt_state = optimizer.init(trainable)
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 7.0), trainable)
    schedule = optimizer_lib.make_schedule(options)
    steps, reported = [], []
    for _ in range(7):
        reported.append(float(optimizer_lib.next_rate(opt_state, schedule=schedule)))
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        steps.append((float(updates["q_proj"]["a"][0]), float(updates["q_proj_moe_gen"]["a"][0])))
    # Adam's step is -rate for a constant gradient: up over two steps, down to zero over four.
    rates = [0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0]
    expected = [(-rate, -rate / 2) for rate in rates]
    np.testing.assert_allclose(steps, expected, atol=1e-6)
    np.testing.assert_allclose(reported, rates, atol=1e-7)


def test_the_average_lags_behind_the_parameters_and_changes_nothing():
    """d = min(limit, rate step): 0.2, 0.4, 0.5, 0.5 of the past."""
    plain = optimizer_lib.make_optimizer(optimizer_options(learning_rate=0.1))
    averaging = optimizer_lib.make_optimizer(
        optimizer_options(learning_rate=0.1, average_rate=0.2, average_limit=0.5)
    )
    params = again = {"a": jnp.array([1.0, -2.0])}
    state, plain_state = averaging.init(params), plain.init(params)
    expected = np.array([1.0, -2.0])
    for decay in (0.2, 0.4, 0.5, 0.5):
        gradient = {"a": params["a"] ** 2 + 0.5}
        updates, state = averaging.update(gradient, state, params)
        plain_updates, plain_state = plain.update(gradient, plain_state, again)
        params = optax.apply_updates(params, updates)
        again = optax.apply_updates(again, plain_updates)
        expected = decay * expected + (1 - decay) * np.asarray(params["a"])
        np.testing.assert_allclose(optimizer_lib.average_of(state)["a"], expected, rtol=1e-6)
    np.testing.assert_array_equal(params["a"], again["a"])
    assert np.abs(np.asarray(params["a"]) - expected).max() > 1e-2
