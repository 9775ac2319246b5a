"""Reads a run's configuration, and refuses unknown keys, wrong values and contradictions.

A ConfigDict ends in `from_config_dict`: nothing below it sees one. What a single field may be is
declared in `config`; here stands what several fields must agree on.
"""

import dataclasses
import functools
import json
import operator
import pathlib
import runpy
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import ml_collections
import pydantic

from alphagrpo_jax import config_rules
from alphagrpo_jax.config import Config, ConfigError, PassOptions
from alphagrpo_jax.runtime.errors import MissingFileError

# What may differ when a run is resumed.
RESUMABLE = (
    "train.steps",
    "train.keep_residuals",  # the same bits
    "eval.",
    "checkpoint.",
    "log.",
    "cache.",
    "verifier.audit",
)
# What may differ too, with a notice: the same numbers but for their last bits.
RESUMABLE_WITH_NOTICE = (
    "mesh.",
    "model.attention",
    "model.path",  # of the same weights
    "model.remat",
    "model.unroll",
    "rollout.micro_batch",
    "train.micro_batch",
    *(f"train.{field.name}" for field in dataclasses.fields(PassOptions)),
    "verifier.",  # but for those below
)
NEVER_RESUMABLE = ("verifier.model", "verifier.instruction")  # another verifier, other questions
# Fields that came after the first runs, and the values by which those runs went.
LATER = {
    "cache.dir": "",
    "checkpoint.stop_seconds": 6.0,
    "log.wandb": "",
    "lora.init_from": "",
    "loss.awm_average_beta": 1.0,
    "loss.awm_clip": 1.0,
    "loss.entropy_mean": "kept",
    "loss.nft_beta": 1.0,
    "model.attention": "plain",
    "model.unroll": 1,
    "optimizer.average_limit": 0.0,
    "optimizer.average_rate": 0.001,
    "train.image_steps_at_once": False,
    "train.keep_residuals": False,
    "train.merge_lora": False,
    "train.text_chunk": 0,
    "verifier.cache_size": 0,
    "verifier.extra_body": "",
    "verifier.instruction": (
        "You are a strict image auditor. Answer only yes or no. "
        "If a subject of the question is absent, answer no."
    ),
    "verifier.min_mass": 1e-3,
    "verifier.read": "first",
    "verifier.max_tokens": 2048,
}

CONFIG = pydantic.TypeAdapter(Config)
Location = tuple[str | int, ...]  # a field of the configuration, or an element of its list


def from_config_dict(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Returns the checked, frozen form of a configuration.

    Raises:
      ConfigError: unknown or missing keys, wrong types, or values that contradict each other.
    """
    mapping = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    try:
        # As JSON, so that lists become tuples and mappings sections; all else stays strict.
        parsed = CONFIG.validate_json(json.dumps(mapping, default=repr))
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_problems(error))) from None
    config_rules.check(parsed)
    return parsed


def from_saved(saved: Mapping[str, Any]) -> Config:
    """Reads the configuration that a run wrote into its folder, the newest fields filled in.

    Raises:
      ConfigError: see `from_config_dict`.
    """
    completed = dict(saved)
    for key, value in LATER.items():
        section, name = key.split(".")
        completed[section] = {name: value} | dict(completed.get(section, {}))
    return from_config_dict(completed)


def change_options(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns a configuration with changed options, checked like a new one.

    Args:
      config: which one.
      changes: new values by key, such as "rollout.guidance.text_scale".
    Raises:
      ConfigError: see `from_config_dict`.
    """
    mapping = dataclasses.asdict(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = functools.reduce(operator.getitem, sections, mapping)
        section[name] = value
    return from_config_dict(mapping)


def to_json(config: Config) -> str:
    """Writes the resolved configuration as text."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


def check_resumable(
    config: Config, saved: Mapping[str, Any], *, weights: str = "", saved_weights: str = ""
) -> str:
    """Refuses to continue a run under another configuration, or with other weights.

    Args:
      config: of this start.
      saved: the JSON object that the run wrote.
      weights: digest of the weights that `model.path` names now; "" if it is not known.
      saved_weights: of those that the run began with; "" if it is not known.
    Returns:
      A notice of differences that are allowed but may change the last bits of numbers; "" without
      any.
    Raises:
      ConfigError: a field that may not change differs, all such fields are listed; or the weights
        are others.
    """
    now, then = flatten(json.loads(to_json(config))), LATER | flatten(saved)
    if config.loss.entropy_fraction == 1.0:  # all tokens are trained: both means are one
        then["loss.entropy_mean"] = config.loss.entropy_mean
    changed = [
        key
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not key.startswith(RESUMABLE)
    ]
    differences = {
        key: f"{key}: the run has {then.get(key)!r}, this start {now.get(key)!r}" for key in changed
    }
    noticed = [
        key
        for key in changed
        if key.startswith(RESUMABLE_WITH_NOTICE) and key not in NEVER_RESUMABLE
    ]
    # A run that asked no chat server had no name for its verifier there.
    if "verifier.model" in changed and not then.get("verifier.model"):
        noticed.append("verifier.model")
    if "model.path" in noticed and not (weights and saved_weights):
        noticed.remove("model.path")
        differences["model.path"] += " (it kept no digest that shows whether these are its weights)"
    if refused := [key for key in changed if key not in noticed]:
        raise ConfigError(
            "the run folder holds a run of another configuration:\n  "
            + "\n  ".join(differences[key] for key in refused)
            + "\nuse these values, or another --workdir"
        )
    if weights and saved_weights and weights != saved_weights:
        raise ConfigError(
            f"model.path={config.model.path!r} holds other weights (digest {weights[:12]}) than "
            f"the run began with ({saved_weights[:12]}, then at {then.get('model.path')!r}); put "
            "the old weights back, or use another --workdir"
        )
    if not noticed:
        return ""
    same_model = any(key.startswith("verifier.") for key in noticed)
    return (
        "notice: the run goes on with other values, which may change the last bits of its numbers"
        + (" (the verifier must be the same model)" if same_model else "")
        + ":\n  "
        + "\n  ".join(differences[key] for key in noticed)
    )


def _problems(error: pydantic.ValidationError) -> list[str]:
    """Lists everything that is wrong with single fields: key, what it got, what is expected."""
    problems: list[str] = []
    names: dict[tuple[str, Location], list[str]] = {}  # of unknown and missing keys, by section
    for detail in error.errors(include_url=False):
        kind, location = detail["type"], detail["loc"]
        if kind in ("unexpected_keyword_argument", "missing") and isinstance(location[-1], str):
            names.setdefault((kind, location[:-1]), []).append(location[-1])
        elif kind == "value_error":  # from the field's own check, which says what it got
            problems.append(f"{_key(location)}: {detail.get('ctx', {})['error']}")
        else:
            location = location[:-1] if kind == "missing" else location  # an element of a list
            expected = "a finite number" if kind == "finite_number" else _allowed(location)
            problems.append(f"{_key(location)}: got {detail['input']!r}, expected {expected}")
    for (kind, location), keys in names.items():
        if kind == "missing":
            problems.append(
                f"{_key(location)}: missing keys {sorted(keys)}; configs/grpo.py has them all"
            )
        else:
            known_keys = sorted(_declaration(location)[0].__pydantic_fields__)
            problems.append(f"{_key(location)}: unknown keys {sorted(keys)}; known: {known_keys}")
    return problems


def _key(location: Location) -> str:
    """Writes a place in the configuration as users do: config.mixed.weights[0]."""
    names = (f"[{name}]" if isinstance(name, int) else f".{name}" for name in location)
    return "config" + "".join(names)


def _declaration(location: Location) -> tuple[Any, list[Any]]:
    """Returns a field's type and its constraints."""
    kind: Any = Config
    constraints: list[Any] = []
    for name in location:
        if isinstance(name, int):
            kind, constraints = typing.get_args(kind)[0], []
            if typing.get_origin(kind) is Annotated:
                kind, field = typing.get_args(kind)
                constraints = field.metadata
        else:
            field = kind.__pydantic_fields__[name]
            kind, constraints = field.annotation, field.metadata
    return kind, constraints


def _allowed(location: Location) -> str:
    """Says in words which values a field may have, by its declaration."""
    kind, constraints = _declaration(location)
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return "a section with keys"
    if typing.get_origin(kind) is Literal:
        return f"one of {arguments}"
    if typing.get_origin(kind) is tuple:
        return "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{word} {getattr(constraint, name)}"
        for constraint in constraints
        for name, word in words.items()
        if hasattr(constraint, name)
    ]
    return " ".join([kind.__name__, " and ".join(limits)]).strip()


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


DEFAULT_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "grpo.py"


def read_config(path: str | pathlib.Path = DEFAULT_CONFIG) -> Config:
    """Reads the configuration that a Python file's `get_config` returns.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: the file is no Python or has no `get_config`; see `from_config_dict`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingFileError(f"no configuration file at {path}; give one with --config")
    try:
        variables = runpy.run_path(str(path))
    except (SyntaxError, ImportError, ValueError) as error:
        raise ConfigError(f"{path} cannot be run ({error}); see configs/grpo.py") from error
    if not callable(variables.get("get_config")):
        raise ConfigError(f"{path} has no function get_config; see configs/grpo.py")
    return from_config_dict(variables["get_config"]())
