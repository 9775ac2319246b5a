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

from alphagrpo_jax.config import Config, ConfigError, PassOptions
from alphagrpo_jax.runtime.errors import MissingFileError
from alphagrpo_jax.score_specs import short_name
from alphagrpo_jax.tasks import IMAGE, TASKS

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
    "loss.entropy_mean": "kept",
    "model.attention": "plain",
    "model.unroll": 1,
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
    _check_sizes(parsed)
    _check_verifier(parsed)
    _check_reward(parsed)
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


def _check_sizes(config: Config) -> None:
    """Checks sizes and modes that must agree with each other."""
    rollout, train = config.rollout, config.train
    lo, hi = rollout.window_range
    if not 0 <= lo <= hi - rollout.window or hi > rollout.num_points - 1:
        raise ConfigError(
            f"rollout.window_range: got {lo, hi} for a window of {rollout.window} among "
            f"{rollout.num_points - 1} steps (rollout.num_points - 1); expected "
            "0 <= lo, lo + window <= hi <= number of steps"
        )
    if rollout.sampler == "cps" and (hi == rollout.num_points - 1 or rollout.noise_level >= 1):
        raise ConfigError(
            "rollout.sampler=cps: the last step has no noise, so window_range must end before it, "
            f"and noise_level must be below 1; got {lo, hi} and {rollout.noise_level}"
        )
    if train.updates_per_batch > 1 and train.old_logprob == "self":
        raise ConfigError(
            f"train.old_logprob=self is exact for one update per batch only; got "
            f"train.updates_per_batch={train.updates_per_batch}: use 'recompute'"
        )
    if config.loss.entropy_fraction < 1 and train.old_logprob == "self":
        raise ConfigError("loss.entropy_fraction below 1 needs train.old_logprob=recompute")
    if config.loss.text == config.loss.image == "none":
        raise ConfigError("loss.text and loss.image are both 'none': nothing would be trained")
    _check_tasks(config)


def _check_tasks(config: Config) -> None:
    """Checks the names of tasks, alone or mixed, and the fields that they need."""
    names, mixed, srr = (*TASKS, "mixed"), config.mixed, config.srr
    if config.task not in names:
        raise ConfigError(f"task: got {config.task!r}, expected one of {names}")
    if config.task == "mixed":
        unknown = sorted(set(mixed.tasks) - set(TASKS))
        if unknown or not mixed.tasks or len(set(mixed.tasks)) < len(mixed.tasks):
            raise ConfigError(
                f"mixed.tasks: got {mixed.tasks}, expected different ones of {tuple(TASKS)}"
            )
        if len(mixed.weights) != len(mixed.tasks):
            raise ConfigError(
                f"mixed.weights: got {mixed.weights}, expected {len(mixed.tasks)} numbers, one for "
                "each of mixed.tasks"
            )
    for task in (TASKS[name] for name in config.tasks):
        if "" in config.data.pair(task.data):
            key = task.data.removesuffix("s")
            raise ConfigError(
                f"task {task.name} needs data.{key}_train and data.{key}_heldout, files of records"
            )
        for kind, steps in (("text", task.text_kinds), ("image", task.events.count(IMAGE))):
            trained_kind = {"text": "image", "image": "text"}[kind]
            if not steps and vars(config.loss)[trained_kind] == "none":
                raise ConfigError(
                    f"task {task.name} has no {kind} to train; loss.{trained_kind} must not be "
                    "'none'"
                )
    refining = [name for name in config.tasks if TASKS[name].refines]
    if config.verifier.kind == "self" and refining and srr.reflection_format == "verifier":
        raise ConfigError(
            "srr.reflection_format=verifier asks long questions, for which verifier.kind=self has "
            "no room; use another verifier, or 'rule' or 'none'"
        )
    if len(refining) > 1:
        raise ConfigError(f"mixed.tasks: got {refining}, but only one task may refine images")
    if not refining:
        if config.advantage.baseline != "group":
            raise ConfigError(
                f"advantage.baseline={config.advantage.baseline!r} compares with an initial "
                "image, which only refining tasks have; use 'group'"
            )
        return
    if srr.queue_prompts < config.train.prompts_per_step:
        raise ConfigError(
            f"srr.queue_prompts: got {srr.queue_prompts}, expected at least "
            f"train.prompts_per_step={config.train.prompts_per_step}"
        )


def _check_reward(config: Config) -> None:
    """Checks the fields that the reward's scores need."""
    reward = config.reward
    names, weights = tuple(map(short_name, reward.scores)), reward.extra_weights
    if len(set(names)) < len(names):
        raise ConfigError(
            f"reward.extra_scores: got {reward.extra_scores} beside reward.score={reward.score!r}, "
            f"which are called {names} in metrics; expected different names: leave out the double "
            "one, or name a scorer by ?name=NAME"
        )
    if len(weights) != len(reward.extra_scores):
        raise ConfigError(
            f"reward.extra_weights: got {weights}, expected {len(reward.extra_scores)} numbers, "
            "one for each of reward.extra_scores (the weight of reward.score is 1)"
        )
    _check_scorers(config)
    if "holistic" not in reward.scores:
        return
    if not all((*reward.rate_semantic, *reward.rate_quality, reward.rate_semantic,
                reward.rate_quality)):  # fmt: skip
        raise ConfigError(
            "reward.rate_semantic and reward.rate_quality: got an empty list or text, expected at "
            "least one question each for the holistic score"
        )
    if "ti2i" in config.tasks:
        raise ConfigError(
            "reward.score=holistic asks how well an image matches its prompt, but the prompts of "
            "task ti2i are instructions; use confidence or binary there"
        )


def _check_scorers(config: Config) -> None:
    """Checks that the verifiers can answer what the scores need."""
    verifier = config.verifier
    if verifier.second and not config.reward.judged:
        raise ConfigError(
            f"verifier.second: got {verifier.second!r}, but reward.score and reward.extra_scores "
            f"{config.reward.scores} ask no verifier; leave it empty"
        )
    needs_likelihood = any(spec.kind == "likelihood" for spec in config.reward.scorers)
    if needs_likelihood and (verifier.kind == "openai" or verifier.endpoints):
        raise ConfigError(
            "the score likelihood is the probability of a prompt's tokens, which chat servers do "
            "not give; use verifier.kind=hf without endpoints, or verifier.kind=self"
        )


def _check_verifier(config: Config) -> None:
    """Checks the fields that endpoints need, and that endpoints are there where needed."""
    verifier = config.verifier
    if verifier.kind == "self":
        has_log = any(spec.has_processes for spec in config.reward.scorers)
        if verifier.endpoints or (verifier.audit and not has_log):
            raise ConfigError(
                "verifier.kind=self: the policy answers alone and keeps no log of attempts; leave "
                "verifier.endpoints and, without scorers that have processes, verifier.audit empty"
            )
        if "holistic" in config.reward.scores:
            raise ConfigError(
                "verifier.kind=self: the policy gives no ratings, so reward.score and "
                "reward.extra_scores must not be holistic"
            )
    if verifier.kind == "openai" and not verifier.endpoints:
        raise ConfigError(
            "verifier.kind=openai needs verifier.endpoints, a list of base URLs such as "
            "('http://127.0.0.1:8000/v1',); launch/verifiers.sh starts a server"
        )
    if not verifier.endpoints and not verifier.second.startswith("openai:"):
        return
    if not verifier.model:
        raise ConfigError(
            "endpoints (verifier.endpoints, verifier.second) need verifier.model, the name that "
            "they serve"
        )
    if verifier.question_seconds > verifier.attempt_seconds:
        raise ConfigError(
            f"verifier.question_seconds={verifier.question_seconds} is more than "
            f"verifier.attempt_seconds={verifier.attempt_seconds}, which all requests "
            "about a question have together"
        )


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
