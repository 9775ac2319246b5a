"""Folders read and written: same names, shapes, dtypes and bytes; every misfit in one message."""

import contextlib
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from alphagrpo_jax.models import bagel_weights
from alphagrpo_jax.models.bagel import base_shapes
from alphagrpo_jax.models.bagel_weights import (
    LoadedModel,
    WeightsError,
    load_model,
    new_model,
    save_model,
)
from alphagrpo_jax.models.name_table import AE, EMA, entries
from alphagrpo_jax.runtime.tokenizer import TokenizerError

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "golden_a"
FILES = (EMA, AE)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(FOLDER)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for path in FOLDER.iterdir():
        if not path.name.startswith("expected"):
            shutil.copy(path, tmp_path)
    return tmp_path


def assert_same_tensors(first: pathlib.Path, second: pathlib.Path) -> None:
    for file in FILES:
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
            assert a[name].tobytes() == b[name].tobytes(), name


def test_round_trip_is_byte_for_byte(loaded: LoadedModel, tmp_path: pathlib.Path):
    save_model(tmp_path, loaded)
    assert_same_tensors(FOLDER, tmp_path)
    names = {path.name for path in FOLDER.iterdir() if not path.name.startswith("expected")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names - set(FILES):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_round_trip_in_bfloat16(loaded: LoadedModel, tmp_path: pathlib.Path):
    save_model(tmp_path / "half", loaded, dtype="bfloat16")
    half = load_model(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.base)} == {jnp.dtype("float32")}
    original = np.asarray(loaded.base["lm_head"]["kernel"])
    rounded = original.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(half.base["lm_head"]["kernel"], rounded)
    save_model(tmp_path / "again", half)
    assert_same_tensors(tmp_path / "half", tmp_path / "again")
    assert load_file(tmp_path / "again" / AE)["decoder.conv_in.bias"].dtype == jnp.bfloat16


def test_known_tensors_land_where_they_belong(loaded: LoadedModel):
    ema, ae = load_file(FOLDER / EMA), load_file(FOLDER / AE)
    layers = loaded.base["language_model"]["layers"]
    name = "language_model.model.layers.2.self_attn.k_proj_moe_gen.weight"
    kernel = layers["self_attn"]["k_proj_moe_gen"]["kernel"]
    np.testing.assert_array_equal(kernel[2], ema[name].T)
    conv = loaded.base["vae"]["decoder"]["up_1"]["block_0"]["conv2"]["kernel"]
    expected = ae["decoder.up.1.block.0.conv2.weight"]  # out, in, height, width
    np.testing.assert_array_equal(conv[2, 0, 5, 7], expected[7, 5, 2, 0])


def test_every_parameter_has_one_name(loaded: LoadedModel):
    table = entries(base_shapes(loaded.model))
    names = [entry.name for entry in table]
    assert len(set(names)) == len(names)
    assert {entry.path for entry in table} == traverse_util.flatten_dict(loaded.base).keys()


def test_misfits_are_listed_together_with_both_shapes(folder: pathlib.Path):
    tensors = load_file(folder / EMA)
    del tensors["vae2llm.bias"]
    tensors["surprise"] = np.zeros((2, 3), np.float32)
    tensors["llm2vae.weight"] = np.zeros((5, 64), np.float32)
    tensors["latent_pos_embed.pos_embed"] = np.zeros((7, 64), np.float32)  # never checked
    save_file(tensors, folder / EMA)
    autoencoder = load_file(folder / AE)
    del autoencoder["encoder.conv_in.bias"]
    save_file(autoencoder, folder / AE)
    with pytest.raises(WeightsError) as error:
        load_model(folder)
    message = str(error.value)
    assert "(4 tensors)" in message
    assert "ema.safetensors: missing vae2llm.bias, expected shape [64]" in message
    assert "ema.safetensors: unexpected surprise of shape [2, 3]" in message
    assert "ema.safetensors: llm2vae.weight has shape [5, 64], expected [16, 64]" in message
    assert "ae.safetensors: missing encoder.conv_in.bias, expected shape [32]" in message


def test_weights_of_another_architecture_name_the_first_misfits_and_count_the_others(
    folder: pathlib.Path,
):
    tensors = {f"blocks.{k}.weight": np.zeros((2, 3), np.float32) for k in range(20)}
    save_file(tensors, folder / EMA)
    with pytest.raises(WeightsError) as error:
        load_model(folder)
    first, *lines = str(error.value).splitlines()
    count = int(re.search(r"\((\d+) tensors\)", first)[1])
    assert "  ema.safetensors: unexpected blocks.0.weight of shape [2, 3]" in "\n".join(lines)
    assert lines[-2:-1] == [f"  and {count - len(lines) + 2} more"]
    assert len(lines) < 20 < count
    assert "one and the same model" in lines[-1]


def test_position_tables_may_be_absent(folder: pathlib.Path):
    tensors = load_file(folder / EMA)
    del tensors["vit_pos_embed.pos_embed"]
    save_file(tensors, folder / EMA)
    save_model(folder / "again", load_model(folder))
    written = load_file(folder / "again" / EMA)["vit_pos_embed.pos_embed"]
    np.testing.assert_array_equal(written, load_file(FOLDER / EMA)["vit_pos_embed.pos_embed"])


@pytest.mark.parametrize("size", [0, 5, 100, -100])
def test_half_a_download(folder: pathlib.Path, size: int):
    """Nothing yet, a part of the header's length, of the header, or of the tensors."""
    contents = (folder / AE).read_bytes()[:size]
    (folder / AE).write_bytes(contents)
    message = rf"ae\.safetensors \({len(contents)} bytes\) is not a complete safetensors file"
    for read in (load_model, bagel_weights.weights_digest):
        with pytest.raises(WeightsError, match=message + r"[^\n]*truncated: download[^\n]*again$"):
            read(folder)


def test_a_missing_file(folder: pathlib.Path):
    (folder / AE).unlink()
    with pytest.raises(FileNotFoundError, match=r"ae\.safetensors does not exist"):
        load_model(folder)


def test_a_tokenizer_of_another_model(folder: pathlib.Path):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|end|>"))
    with pytest.raises(TokenizerError, match=r"lacks the special tokens \['<\|im_end\|>'\]"):
        load_model(folder)


@pytest.mark.parametrize("more", [-1, 7])
def test_a_model_may_have_more_embeddings_than_tokens_but_not_fewer(
    folder: pathlib.Path, more: int
):
    """Also where a token that is no special one lies beyond the last embedding."""
    path = folder / "llm_config.json"
    fields = json.loads(path.read_text())
    fields["vocab_size"] += more
    path.write_text(json.dumps(fields))
    # Without this the last id, 404, is a special one.
    text = (folder / "tokenizer.json").read_text().replace("<|vision_end|>", "<|last|>")
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|vision_end|>"))
    with pytest.raises(WeightsError) as error:
        load_model(folder)
    fits = "ids up to 404, but vocab_size of llm_config.json is 404, expected at least 405"
    assert (fits in str(error.value)) == (more < 0)
    assert ("lm_head.weight has shape [405, 64], expected [412, 64]" in str(error.value)) == (
        more > 0
    )


def test_leaves_lie_where_the_caller_says(loaded: LoadedModel):
    placed = {}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding_of(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        placed[path] = shape
        return sharding

    again = load_model(FOLDER, sharding_of=sharding_of)
    assert len(placed) == len(jax.tree.leaves(loaded.base))
    kernel = loaded.base["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert placed["language_model/layers/mlp/up_proj/kernel"] == kernel.shape
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.base, again.base))


@pytest.mark.parametrize("block", [bagel_weights.BLOCK_BYTES, 100])
def test_any_part_of_a_leaf_can_be_read(loaded: LoadedModel, monkeypatch, block):
    """As a process does whose devices hold a part of it; tensors are read block by block."""
    monkeypatch.setattr(bagel_weights, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(loaded.base)
    groups = {path: [] for path in flat}
    for entry in entries(base_shapes(loaded.model)):
        groups[entry.path].append(entry)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(bagel_weights._open(FOLDER, name)) for name in (EMA, AE)}
        for path, leaf in flat.items():
            ends = [int(rng.integers(1, size + 1)) for size in leaf.shape]
            bounds = tuple((int(rng.integers(0, end)), end) for end in ends)
            part = bagel_weights._read_part(files, groups[path], bounds, np.float32)
            expected = leaf[tuple(slice(*pair) for pair in bounds)]
            np.testing.assert_array_equal(part, expected, str(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_may_lie_in_several_files(loaded: LoadedModel, folder: pathlib.Path, dtype: str):
    save_model(folder, loaded, dtype=dtype)
    expected = load_model(folder)
    tensors = load_file(folder / EMA)
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        shard = {name: tensors[name] for name in names[number::3]}
        file = f"ema-0000{number + 1}-of-00003.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / EMA).unlink()
    index = folder / (EMA + ".index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    again = load_model(folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, expected.base, again.base))
    assert again.weights == expected.weights == bagel_weights.weights_digest(folder)
    (folder / "ema-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ema-00002-of-00003\.safetensors does not exist"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(WeightsError, match=r"index\.json is no index of weight files"):
        load_model(folder)


def test_the_digest_tells_weights_apart(loaded: LoadedModel, folder: pathlib.Path):
    digests = {loaded.weights, bagel_weights.weights_digest(folder)}
    assert len(digests) == 1
    for file, name in (
        (EMA, "language_model.model.layers.1.mlp.up_proj.weight"),
        (EMA, "language_model.model.norm.weight"),
        (AE, "decoder.conv_in.bias"),
    ):
        tensors = load_file(folder / file)
        tensors[name] = np.nextafter(tensors[name], np.float32(9))
        save_file(tensors, folder / file)
        digests.add(bagel_weights.weights_digest(folder))
    save_model(folder, loaded, dtype="bfloat16")
    digests.add(bagel_weights.weights_digest(folder))
    assert len(digests) == 5
    for digest in digests:
        assert len(digest) == 64


def test_a_new_model_can_be_saved_and_loaded(loaded: LoadedModel, tmp_path: pathlib.Path):
    contents = loaded.config.to_dicts()
    fresh = new_model(
        jax.random.key(0),
        loaded.tokenizer,
        llm=contents["llm_config.json"],
        vit=contents["vit_config.json"],
        vae=contents["vae_config.json"],
        bagel=contents["bagel_config.json"],
    )
    save_model(tmp_path, fresh)
    again = load_model(tmp_path)
    assert again.config == fresh.config
    assert jax.tree.all(jax.tree.map(np.array_equal, fresh.base, again.base))
