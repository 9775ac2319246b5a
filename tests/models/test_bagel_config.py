"""Defaults of the JSON files: a missing file is not a missing field."""

import json
import pathlib
import shutil

import pytest

from alphagrpo_jax.models.bagel_config import BagelConfig, ImageSizes, ModelConfigError
from alphagrpo_jax.models.vae import VAEConfig
from alphagrpo_jax.runtime.tokenizer import SpecialTokens

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "golden_a"
TOKENS = SpecialTokens(401, 402, 403, 404)
JSON = ("llm_config.json", "vit_config.json", "vae_config.json", "bagel_config.json")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in JSON:
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def edit(path: pathlib.Path, **fields) -> None:
    contents = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in contents.items() if v is not None}))


def test_recorded_folder():
    config = BagelConfig.from_folder(FOLDER, TOKENS)
    assert (config.llm.head_dim, config.llm.rope_theta) == (16, 1e6)
    assert (config.vit.num_hidden_layers, config.vit.used_layers) == (3, 2)
    assert config.vae.ch_mult == (1, 2, 2)
    assert (config.latent_width, config.latent_stride, config.patch_width) == (16, 8, 48)
    assert config.latent_grid(40, 64) == (5, 8)
    assert config.vit_grid(28, 44) == (7, 11)
    assert hash(config) == hash(BagelConfig.from_folder(FOLDER, TOKENS))


def test_missing_files_mean_the_official_application(folder: pathlib.Path):
    (folder / "vae_config.json").unlink()
    (folder / "bagel_config.json").unlink()
    edit(folder / "vit_config.json", patch_size=14, image_size=980)
    config = BagelConfig.from_folder(folder, TOKENS)
    assert config.vae == VAEConfig()
    assert (config.vae.ch, config.vae.ch_mult, config.vae.z_channels) == (128, (1, 2, 4, 4), 16)
    assert (config.latent_patch_size, config.max_latent_size) == (2, 64)
    assert config.vit_max_num_patch_per_side == 70
    assert config.vae_transform == ImageSizes(1024, 512, 16)
    assert config.vit_transform == ImageSizes(980, 224, 14)


def test_missing_fields_mean_the_official_class(folder: pathlib.Path):
    (folder / "bagel_config.json").write_text("{}")
    edit(folder / "vit_config.json", patch_size=14, image_size=980, layer_norm_eps=None)
    config = BagelConfig.from_folder(folder, TOKENS)
    assert (config.max_latent_size, config.timestep_shift) == (32, 1.0)
    assert (config.connector_act, config.interpolate_pos) == ("gelu_pytorch_tanh", False)
    assert config.vit.layer_norm_eps == 1e-6


def test_transform_sizes_come_from_the_folder(folder: pathlib.Path):
    edit(folder / "bagel_config.json", vit_transform={"min": 378})
    config = BagelConfig.from_folder(folder, TOKENS)
    assert config.vit_transform == ImageSizes(980, 378, 14)


def test_dicts_there_and_back():
    config = BagelConfig.from_folder(FOLDER, TOKENS)
    contents = config.to_dicts()
    again = BagelConfig.from_dicts(*(contents[name] for name in JSON), tokens=TOKENS)
    assert again == config


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("llm_config.json", {"hidden_size": None}, r"lacks \['hidden_size'\]"),
        ("llm_config.json", {"num_attention_heads": 5}, "num_attention_heads is 5"),
        ("llm_config.json", {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ("vit_config.json", {"image_size": 60}, "image_size // patch_size = 15"),
        ("vit_config.json", {"num_hidden_layers": 1}, "expected at least 2"),
        ("vae_config.json", {"downsample": 8}, "downsample is 8"),
        ("vae_config.json", {"ch": 33}, "multiples of 32"),
        (
            "llm_config.json",
            {"hidden_size": "64"},
            "hidden_size is '64', expected a positive whole",
        ),
        ("llm_config.json", {"rope_theta": [1]}, r"rope_theta is \[1\], expected a float"),
        ("vit_config.json", {"patch_size": 0}, "patch_size is 0, expected a positive whole"),
        ("vit_config.json", {"hidden_act": 3}, "hidden_act is 3, expected a str"),
        ("vae_config.json", {"ch_mult": 4}, "ch_mult is 4, expected a list of such: a positive"),
        ("vae_config.json", {"ch_mult": [1, "2"]}, r"ch_mult is \[1, '2'\], expected a list"),
        ("bagel_config.json", {"interpolate_pos": 1}, "interpolate_pos is 1, expected a bool"),
        ("bagel_config.json", {"max_latent_size": True}, "max_latent_size is True, expected a"),
        (
            "bagel_config.json",
            {"vit_transform": [378]},
            r"vit_transform: got \[378\], expected a JSON",
        ),
        ("bagel_config.json", {"vae_transform": {"max": "9"}}, "vae_transform: max_size is '9'"),
    ],
)
def test_contradictions(folder: pathlib.Path, file: str, fields: dict, message: str):
    edit(folder / file, **fields)
    with pytest.raises(ValueError, match=message):
        BagelConfig.from_folder(folder, TOKENS)


def test_unreadable_files(folder: pathlib.Path):
    (folder / "bagel_config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"bagel_config\.json is not valid JSON"):
        BagelConfig.from_folder(folder, TOKENS)
    for name in JSON:
        shutil.copy(FOLDER / "bagel_config.json", folder)
        (folder / name).write_text("[1]")
        with pytest.raises(ModelConfigError, match=rf"{name}: got \[1\], expected a JSON object"):
            BagelConfig.from_folder(folder, TOKENS)
        shutil.copy(FOLDER / name, folder)
    (folder / "llm_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"llm_config\.json does not exist"):
        BagelConfig.from_folder(folder, TOKENS)


def test_a_null_number_of_key_value_heads_is_that_of_the_query_heads(folder):
    path = folder / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": None}))
    config = BagelConfig.from_folder(folder, TOKENS)
    assert config.llm.num_key_value_heads == config.llm.num_attention_heads


@pytest.mark.parametrize(
    ("file", "name"), [("vit_config.json", "hidden_act"), ("bagel_config.json", "connector_act")]
)
def test_an_unknown_activation_is_named(folder, file, name):
    edit(folder / file, **{name: "mish"})
    with pytest.raises(ModelConfigError, match=f"{file}: {name} is 'mish', expected one of"):
        BagelConfig.from_folder(folder, TOKENS)
