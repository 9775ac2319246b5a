"""FLOPs of an update, counted by hand, and the metrics made of them."""

import dataclasses
import types

import pytest
from default_options import DEFAULT

from alphagrpo_jax.config_checks import change_options
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.flops import decoder_flops, head_flops, layer_weights
from alphagrpo_jax.runtime import chips
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training import speed


@pytest.fixture(scope="module")
def model():
    folder = resolve("package:umm")
    return BagelConfig.from_folder(folder, Tokenizer.from_folder(folder).special)


def flops(config, model, task="rt2i", rows=2, text_tokens=10.0):
    return speed.update_flops(config, model, TASKS[task], rows=rows, text_tokens=text_tokens)


def test_an_update_counts_its_sampling_and_its_passes(model):
    config = change_options(DEFAULT, {"rollout.num_points": 12, "rollout.window": 2})
    height, width = model.latent_grid(config.model.height, config.model.width)
    text = decoder_flops(model, 2, 10, 0) + head_flops(model, 2, 10)
    image = decoder_flops(model, 2, height * width, 10)
    sampled, trained = text + 11 * image, text + 2 * image
    assert flops(config, model) == pytest.approx(sampled + 2 * trained)
    for twice in ({"train.old_logprob": "self"}, {"train.keep_residuals": False}):
        assert flops(change_options(config, twice), model) == flops(config, model)
    texts_alone = change_options(config, {"loss.image": "none"})
    assert flops(texts_alone, model) == pytest.approx(sampled + 2 * text)
    with_kl = change_options(config, {"loss.report_kl": True, "train.trainable": "full"})
    assert flops(with_kl, model) == pytest.approx(sampled + (1 + 3) * trained)
    assert flops(config, model, rows=4) == pytest.approx(2 * flops(config, model))


def test_guidance_evaluates_further_contexts(model):
    guided = change_options(
        DEFAULT,
        {"rollout.guidance.text_scale": 4.0, "rollout.guidance.interval": (0.0, 1.0)},
    )
    height, width = model.latent_grid(guided.model.height, guided.model.width)
    image = decoder_flops(model, 2, height * width, 10)
    steps = guided.rollout.num_points - 1 + 2 * guided.rollout.window
    assert flops(guided, model) - flops(DEFAULT, model) == pytest.approx(steps * image)


def test_velocities_of_finished_images_are_not_guided_and_have_an_average(model):
    config = change_options(
        DEFAULT,
        {
            "loss.image": "nft",
            "rollout.sampler": "ode",
            "optimizer.average_limit": 0.3,
            "rollout.guidance.text_scale": 4.0,
            "rollout.guidance.interval": (0.0, 1.0),
        },
    )
    height, width = model.latent_grid(config.model.height, config.model.width)
    text = decoder_flops(model, 2, 10, 0) + head_flops(model, 2, 10)
    image = decoder_flops(model, 2, height * width, 10)
    steps, window = config.rollout.num_points - 1, config.rollout.window
    sampled = text + 2 * steps * image
    assert flops(config, model) == pytest.approx(sampled + 2 * text + (2 + 1) * window * image)


def test_weights_of_a_layer_are_those_of_the_model(model):
    llm = model.llm
    heads = 2 * llm.num_attention_heads + 2 * llm.num_key_value_heads
    per_layer = llm.hidden_size * heads * llm.head_dim
    per_layer += 3 * llm.hidden_size * llm.intermediate_size
    assert layer_weights(model) == llm.num_hidden_layers * per_layer


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
     ("TPU v5 lite", 197e12), ("TPU v6 lite", 918e12), ("TPU v4", 275e12), ("cpu", None),
     ("NVIDIA H300", None)],
)  # fmt: skip
def test_chips_are_known_by_the_names_of_their_kind(kind, flops):
    peak = chips.peak_of(kind)
    assert (peak and peak.flops) == flops


def test_speed_is_per_device_and_the_share_of_its_peak(model, monkeypatch):
    rollout = types.SimpleNamespace(
        batch=types.SimpleNamespace(task=TASKS["rt2i"]),
        records=[None] * 6,
        metrics={"text/length": 10.0},
    )
    seconds = {"time/rollout": 2.0, "time/update": 1.0, "time/eval": 100.0}
    metrics = speed.speed_metrics(DEFAULT, model, [rollout], seconds)
    assert metrics == {"time/images_per_second_per_device": pytest.approx(2.0)}  # a CPU
    devices = [types.SimpleNamespace(device_kind="NVIDIA H200")] * 2
    monkeypatch.setattr(speed.jax, "devices", lambda: devices)
    metrics = speed.speed_metrics(DEFAULT, model, [rollout], seconds)
    assert metrics["time/images_per_second_per_device"] == pytest.approx(1.0)
    expected = flops(DEFAULT, model, rows=6) / (3.0 * 2 * 989e12)
    assert metrics["time/mfu"] == pytest.approx(expected)
    answers = dataclasses.replace(TASKS["ti2t"])
    rollout.batch.task = answers
    metrics = speed.speed_metrics(DEFAULT, model, [rollout], seconds)
    assert metrics["time/images_per_second_per_device"] == 0.0
