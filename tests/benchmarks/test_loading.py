"""The benchmark of loading writes a folder in several files and loads it by real processes."""

import pytest

from alphagrpo_jax.models.bagel_weights import load_model
from benchmarks import loading

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SIZES", SMALL)
    monkeypatch.setattr(loading, "FILE_BYTES", 10**5)
    loading.write_folder(tmp_path / "model", 2)
    return tmp_path / "model"


def test_the_folder_has_several_files_and_can_be_loaded(folder):
    assert len(list(folder.glob("ema-*.safetensors"))) > 1
    assert load_model(folder).config.llm.num_hidden_layers == 2


@pytest.mark.slow
def test_two_processes_hold_what_the_layout_says(folder, tmp_path):
    sharded = loading.measure(folder, "sharded", 2, tmp_path)
    replicated = loading.measure(folder, "replicated", 2, tmp_path)
    assert (
        sharded.arrays
        < replicated.arrays
        < 2 * sharded.arrays + sum(path.stat().st_size for path in folder.glob("ae.safetensors"))
    )
    assert sharded.shard <= replicated.shard
