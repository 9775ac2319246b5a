"""Training of the small autoencoder: beginning, stopping and exact resuming, with tiny batches."""

import itertools
import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alphagrpo_jax.models.bagel_weights import AE, VAE_FILE
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.shapes.pretraining import train_vae

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def few_scenes_measured(monkeypatch):
    monkeypatch.setattr(train_vae, "MEASURED_BATCHES", 1)


def train(out: pathlib.Path, *, stop_after: int | None = None, **changed) -> int:
    calls = itertools.count(1)
    options = {"steps": 4, "batch": 2, "lr": 1e-3, "kl_weight": 3e-4, "seed": 0, "start": None}
    options |= {"latent_noise": None, "crowded": 0.5} | changed
    return train_vae.train(out, stopped=lambda: next(calls) == stop_after, **options)


def test_resumed_runs_equal_uninterrupted_ones(tmp_path):
    uninterrupted, resumed = tmp_path / "whole", tmp_path / "parts"
    assert train(uninterrupted) == cli.DONE
    assert train(resumed, stop_after=2) == cli.STOPPED
    torch.manual_seed(123)  # whatever happens in between
    assert train(resumed) == cli.DONE
    for name in (AE, VAE_FILE):
        assert (uninterrupted / name).read_bytes() == (resumed / name).read_bytes()

    # The decoder alone, from there.
    noised = {"start": uninterrupted, "latent_noise": 0.15}
    assert train(tmp_path / "whole2", **noised) == cli.DONE
    assert train(tmp_path / "parts2", stop_after=1, **noised) == cli.STOPPED
    assert train(tmp_path / "parts2", **noised) == cli.DONE
    weights = (tmp_path / "whole2" / AE).read_bytes()
    assert weights == (tmp_path / "parts2" / AE).read_bytes()
    before, after = load_file(uninterrupted / AE), load_file(tmp_path / "whole2" / AE)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("encoder"), name

    # Nothing is left but to write the result.
    (tmp_path / "whole2" / AE).unlink()
    assert train(tmp_path / "whole2", **noised) == cli.DONE
    assert (tmp_path / "whole2" / AE).read_bytes() == weights


def test_other_options_are_refused_by_name(tmp_path):
    train(tmp_path, steps=1)
    file = tmp_path / "state.pt"
    content = file.read_bytes()
    with pytest.raises(ValueError, match=r"batch: the run has 2, this start 3\n  lr: .*\nrepeat"):
        train(tmp_path, steps=1, batch=3, lr=1.0)
    assert file.read_bytes() == content


def test_noise_depends_on_seed_and_step():
    samples = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        train_vae.seed_noise(seed, step)
        samples.setdefault((seed, step), []).append(torch.rand(1).item())
    assert samples[0, 0][0] == samples[0, 0][1]
    assert len({values[0] for values in samples.values()}) == 3


def test_schedule_warms_up_and_decays_with_the_steps():
    rates = [train_vae.schedule(step, 1000) for step in (0, 49, 500, 999)]
    np.testing.assert_allclose(rates, [0.01, 0.5 * (1 - 0.049**2), 0.75, 0.02])


def test_exported_configuration_measures_the_latent(tmp_path):
    torch.manual_seed(0)
    model = train_vae.AutoEncoder(train_vae.CONFIG)
    train_vae.export(model, tmp_path)
    fields = json.loads((tmp_path / VAE_FILE).read_text())
    x, _ = train_vae.sample_batch(np.random.default_rng(10_000), 32)
    with torch.no_grad():
        mean = model.encoder(x).chunk(2, dim=1)[0]
    latent = fields["scale_factor"] * (mean - fields["shift_factor"])
    assert latent.std().item() == pytest.approx(1.0, abs=1e-3)
    assert latent.mean().item() == pytest.approx(0.0, abs=1e-3)
