"""Sizes and rules of a BAGEL folder, from its JSON files."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphagrpo_jax.models.layers import ACTIVATIONS
from alphagrpo_jax.models.vae import VAEConfig
from alphagrpo_jax.runtime.errors import MissingFileError, UserError
from alphagrpo_jax.runtime.images import ImageSizes
from alphagrpo_jax.runtime.tokenizer import SpecialTokens

LLM_FILE, VIT_FILE = "llm_config.json", "vit_config.json"
VAE_FILE, BAGEL_FILE = "vae_config.json", "bagel_config.json"
# The official application's value for a folder that has no bagel_config.json; a file that
# exists but lacks a field falls back on the official configuration class (the field defaults).
OFFICIAL_APPLICATION = {"max_latent_size": 64}
MAY_BE_ZERO = ("num_res_blocks",)
NESTED = ("llm", "vit", "vae", "tokens")  # fields of BagelConfig that come from other files
VAE_TRANSFORM = ImageSizes(max_size=1024, min_size=512, stride=16)
VIT_TRANSFORM = ImageSizes(max_size=980, min_size=224, stride=14)


class ModelConfigError(UserError, ValueError):
    """A configuration file with a missing field or a value that contradicts another."""


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """The Qwen2-MoT decoder: two experts per layer, joint attention, QK norm, untied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_divides(LLM_FILE, "num_attention_heads", self.num_attention_heads, self.hidden_size)
        _check_divides(
            LLM_FILE, "num_key_value_heads", self.num_key_value_heads, self.num_attention_heads
        )

    @property
    def head_dim(self) -> int:
        """Returns the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The SigLIP encoder. `num_hidden_layers` is the file's: the last layer is never used."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        _check_divides(VIT_FILE, "num_attention_heads", self.num_attention_heads, self.hidden_size)
        if self.num_hidden_layers < 2:
            raise ModelConfigError(
                f"{VIT_FILE}: num_hidden_layers is {self.num_hidden_layers}, expected at least 2 "
                "(the last layer is dropped)"
            )

    @property
    def used_layers(self) -> int:
        """Returns the number of layers that are evaluated and stored."""
        return self.num_hidden_layers - 1


@dataclasses.dataclass(frozen=True)
class BagelConfig:
    """Everything that the policy needs to know about a folder, hashable."""

    llm: LLMConfig
    vit: ViTConfig
    vae: VAEConfig
    tokens: SpecialTokens
    latent_patch_size: int = 2
    max_latent_size: int = 32
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    vae_transform: ImageSizes = VAE_TRANSFORM
    vit_transform: ImageSizes = VIT_TRANSFORM

    def __post_init__(self) -> None:
        for file, name, value in (
            (VIT_FILE, "hidden_act", self.vit.hidden_act),
            (BAGEL_FILE, "connector_act", self.connector_act),
        ):
            if value not in ACTIVATIONS:
                raise ModelConfigError(
                    f"{file}: {name} is {value!r}, expected one of {sorted(ACTIVATIONS)}"
                )
        side = self.vit.image_size // self.vit.patch_size
        if side != self.vit_max_num_patch_per_side:
            raise ModelConfigError(
                f"{VIT_FILE} gives image_size // patch_size = {side} but {BAGEL_FILE} gives "
                f"vit_max_num_patch_per_side = {self.vit_max_num_patch_per_side}; both index the "
                "same position table, make them equal"
            )
        if self.llm.hidden_size % 4:
            raise ModelConfigError(
                f"{LLM_FILE}: hidden_size is {self.llm.hidden_size}, expected a multiple of 4 "
                "(sin-cos position tables)"
            )

    @property
    def latent_width(self) -> int:
        """Returns the features C of a latent token."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @property
    def latent_stride(self) -> int:
        """Returns the pixels per side of a latent token."""
        return self.latent_patch_size * self.vae.downsample

    @property
    def patch_width(self) -> int:
        """Returns the features of a ViT patch."""
        return self.vit.patch_size**2 * self.vit.num_channels

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns token rows and columns of an image of `height` x `width` pixels."""
        return height // self.latent_stride, width // self.latent_stride

    def vit_grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns patch rows and columns of an image of `height` x `width` pixels."""
        return height // self.vit.patch_size, width // self.vit.patch_size

    @classmethod
    def from_dicts(
        cls,
        llm: Mapping[str, Any],
        vit: Mapping[str, Any],
        vae: Mapping[str, Any] | None,
        bagel: Mapping[str, Any] | None,
        *,
        tokens: SpecialTokens,
    ) -> "BagelConfig":
        """Builds the configuration from the contents of the four JSON files.

        Args:
          llm: contents of llm_config.json.
          vit: contents of vit_config.json.
          vae: contents of vae_config.json; None for FLUX.
          bagel: contents of bagel_config.json; None for the official application's values.
          tokens: ids of the special tokens, from the tokenizer.
        Raises:
          ModelConfigError: a missing field or contradicting values.
        """
        rules = _set_fields(BAGEL_FILE, OFFICIAL_APPLICATION if bagel is None else bagel)
        transforms: dict[str, Any] = {
            name: _transform(rules.pop(name, {}), default, f"{BAGEL_FILE}: {name}")
            for name, default in (
                ("vae_transform", VAE_TRANSFORM),
                ("vit_transform", VIT_TRANSFORM),
            )
        }
        bagel_rules = _declared(cls, {name: x for name, x in rules.items() if name not in NESTED})
        llm_fields = _set_fields(LLM_FILE, llm)
        heads = {"num_key_value_heads": llm_fields.get("num_attention_heads")}
        return cls(
            llm=_build(LLMConfig, LLM_FILE, heads | llm_fields),
            vit=_build(ViTConfig, VIT_FILE, vit),
            vae=_build(VAEConfig, VAE_FILE, {} if vae is None else vae),
            tokens=tokens,
            **_checked(cls, BAGEL_FILE, bagel_rules),
            **transforms,
        )

    def to_dicts(self) -> dict[str, dict[str, Any]]:
        """Returns the contents of the four JSON files by file name; `from_dicts` reads them."""
        contents = {
            file: dataclasses.asdict(section)
            for file, section in ((LLM_FILE, self.llm), (VIT_FILE, self.vit), (VAE_FILE, self.vae))
        }
        rules = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in NESTED
        }
        for name in ("vae_transform", "vit_transform"):
            sizes = rules[name]
            rules[name] = {"max": sizes.max_size, "min": sizes.min_size, "stride": sizes.stride}
        return contents | {BAGEL_FILE: rules}

    @classmethod
    def from_folder(cls, folder: str | Path, tokens: SpecialTokens) -> "BagelConfig":
        """Reads the configuration of a folder in the official layout.

        Raises:
          FileNotFoundError: no llm_config.json or vit_config.json.
          ModelConfigError: see `from_dicts`.
        """
        folder = Path(folder)
        return cls.from_dicts(
            read_json(folder / LLM_FILE),
            read_json(folder / VIT_FILE),
            read_json(folder / VAE_FILE) if (folder / VAE_FILE).exists() else None,
            read_json(folder / BAGEL_FILE) if (folder / BAGEL_FILE).exists() else None,
            tokens=tokens,
        )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
      FileNotFoundError: the file does not exist.
      ModelConfigError: the file is not JSON.
    """
    if not path.exists():
        present = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        raise MissingFileError(
            f"{path} does not exist; expected a BAGEL folder ({LLM_FILE}, {VIT_FILE}, "
            f"ema.safetensors, ae.safetensors, tokenizer files), found "
            f"{'no such folder' if present is None else present}; check model.path"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelConfigError(
            f"{path} is not valid JSON ({error}); fetch the file again"
        ) from error


def _set_fields(where: str, fields: Any) -> dict[str, Any]:
    """Returns the fields of a JSON object that have a value; null counts as missing."""
    if not isinstance(fields, Mapping):
        raise ModelConfigError(
            f"{where}: got {fields!r:.80}, expected a JSON object with named fields"
        )
    return {name: value for name, value in fields.items() if value is not None}


def _transform(fields: Any, default: ImageSizes, where: str) -> ImageSizes:
    """Parses the size rule of an image transform: max, min and stride."""
    entry = _set_fields(where, fields)
    sizes = {"max_size": entry.get("max"), "min_size": entry.get("min")}
    sizes = _set_fields(where, sizes | {"stride": entry.get("stride")})
    return dataclasses.replace(default, **_checked(ImageSizes, where, sizes))


def _checked(cls: type, where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that fields have the types that a class declares; integers are sizes, so positive."""
    checked, hints = {}, typing.get_type_hints(cls)
    for name, value in fields.items():
        kind, is_list = hints[name], typing.get_origin(hints[name]) is tuple
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        items = value if is_list and isinstance(value, list | tuple) else [value]
        wanted = typing.get_args(kind)[0] if is_list else kind
        least = 0 if name in MAY_BE_ZERO else 1
        fits = all(type(x) is wanted and (wanted is not int or x >= least) for x in items)
        if not fits or (is_list and items is not value):
            meant = "a positive whole number" if wanted is int else f"a {wanted.__name__}"
            raise ModelConfigError(
                f"{where}: {name} is {value!r}, expected {'a list of such: ' * is_list}{meant}"
            )
        checked[name] = tuple(items) if is_list else value
    return checked


def _declared(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the fields that a class does not declare: official files hold many more."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in fields.items() if name in names}


def _build(cls: type, file: str, fields: Mapping[str, Any]) -> Any:
    fields = _set_fields(file, fields)
    required = [
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    ]
    missing = [name for name in required if fields.get(name) is None]
    if missing:
        raise ModelConfigError(
            f"{file} lacks {missing}; expected at least {required}, got {sorted(fields)}"
        )
    return cls(**_checked(cls, file, _declared(cls, fields)))


def _check_divides(file: str, name: str, divisor: int, dividend: int) -> None:
    if divisor < 1 or dividend % divisor:
        raise ModelConfigError(f"{file}: {name} is {divisor}, expected a divisor of {dividend}")
