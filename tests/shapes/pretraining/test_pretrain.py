"""Pretraining of the small UMM: beginning, stopping and exact resuming, with few rows."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from alphagrpo_jax import policy
from alphagrpo_jax.models import bagel_weights, kv_cache
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.pretraining import pretrain, pretrain_loss
from alphagrpo_jax.shapes.pretraining.batches import BatchSizes, patch_words

SMALL = resolve("package:umm")
SIZES = BatchSizes(draw=2, plan=1, plain=1, reflect=1, edit=1, understand=2)


@pytest.fixture(autouse=True)
def compiled_anew():
    """A test's objective must not be compiled into another's update."""
    pretrain.train_step.clear_cache()
    yield
    pretrain.train_step.clear_cache()


def drawing_alone(trained, frozen, model, batch, prompts, key, recipe):
    """A part of the objective that compiles in a tenth of the time."""
    params = PolicyParams({**trained, "vae": frozen})
    latents = policy.encode_image(model, params, pretrain_loss.pixels(batch["draw_image"]))
    ctx, text = pretrain_loss.text_nll(model, params, kv_cache.empty(len(latents)), batch["draw"])
    flow = pretrain_loss.flow_error(model, params, ctx, latents, key, 1)
    return text + flow, {"text": text, "flow": flow}


def train(out: pathlib.Path, *, stop_after: int | None = None, **changed) -> int:
    calls = iter(range(1, 100))
    options = {"steps": 4, "seed": 0, "sizes": SIZES, "start": SMALL} | changed
    return pretrain.train(out, SMALL, stopped=lambda: next(calls) == stop_after, **options)


def rows(folder: pathlib.Path) -> list[dict]:
    logged = [json.loads(line) for line in (folder / pretrain.LOG).read_text().splitlines()]
    return [row | {"spent": None} for row in logged]


def check_resume(folder: pathlib.Path, **options) -> None:
    uninterrupted, resumed = folder / "whole", folder / "parts"
    assert train(uninterrupted, **options) == cli.DONE
    assert train(resumed, stop_after=2, **options) == cli.STOPPED
    with (resumed / pretrain.LOG).open("a") as file:
        file.write('{"step": 3}\n{"st')  # done, but lost with its checkpoint
    assert train(resumed, **options) == cli.DONE
    for name in (bagel_weights.EMA, bagel_weights.AE):
        assert (uninterrupted / name).read_bytes() == (resumed / name).read_bytes()
    assert rows(uninterrupted) == rows(resumed)
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "pretraining_loss", drawing_alone)
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    check_resume(tmp_path)
    weights = tmp_path / "parts" / bagel_weights.EMA
    expected = weights.read_bytes()
    assert expected != (SMALL / bagel_weights.EMA).read_bytes()

    weights.write_bytes((SMALL / bagel_weights.EMA).read_bytes())
    assert train(tmp_path / "parts") == cli.DONE  # nothing left but to write the weights
    assert weights.read_bytes() == expected

    wider = dataclasses.replace(SIZES, draw=3)
    with pytest.raises(ValueError, match=r"(?s)draw: the run has 2, this start 3\n  seed: .* 1\n"):
        train(tmp_path / "parts", seed=1, sizes=wider)


@pytest.mark.slow
def test_whole_objective_resumes_from_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    check_resume(tmp_path, start=None)
    assert {"text/plan", "flow/edit"} <= rows(tmp_path / "whole")[0].keys()


def test_patches_show_the_words_of_their_cells():
    tokenizer = Tokenizer.from_folder(SMALL)
    scene = scenes.Scene((scenes.SceneObject("circle", "red", 0, 2),), "gray")
    words = patch_words(tokenizer, scene)
    said = [[tokenizer.decode([token]).strip() for token in cell] for cell in words]
    assert said[2] == ["circle", "red"]
    assert said[:2] + said[3:] == [["background", "gray"]] * 8


def test_look_loss_is_that_of_a_patch_between_its_two_words(monkeypatch):
    loaded = bagel_weights.load_model(SMALL)
    table = np.eye(loaded.config.llm.vocab_size, dtype=np.float32)
    words = np.array([[[3, 5]] * 9], np.int32)
    patches = np.repeat((table[3] + table[5])[None, None], 9, axis=1)
    monkeypatch.setattr(policy, "embed_text", lambda *_: table)
    monkeypatch.setattr(policy, "embed_patches", lambda *_: patches)
    batch = {"source": np.zeros((1, 48, 48, 3), np.uint8), "words": words}
    loss = pretrain_loss.look_loss(loaded.model, PolicyParams(loaded.base), batch)
    pull = np.exp(15 / np.sqrt(2))  # both cosines are 1 / sqrt(2), all others 0
    expected = -np.log(pull / (2 * pull + len(table) - 2))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_start_leaves_the_other_run_behind(tmp_path):
    start = tmp_path / "start"
    (start / "checkpoints" / "7").mkdir(parents=True)
    for name in ("README.md", pretrain.LOG, bagel_weights.EMA):
        (start / name).write_text("theirs")
    pretrain.write_start_model(tmp_path / "out", SMALL, 0, start)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [bagel_weights.EMA]


def test_schedule_warms_up_and_decays_with_the_steps():
    rates = [pretrain.schedule(step, 2000) for step in (0, 49, 99, 800, 1400, 1999)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1.0, 1.0, 0.5, 0.02])
