"""Reads a run's configuration; unknown keys and contradictions are refused here.

A ConfigDict ends in `from_config_dict`: nothing below it sees one.
"""

import dataclasses
import json
import pathlib
import re
import runpy
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from alphagrpo_jax.config import Config, ConfigError, check_key_name
from alphagrpo_jax.tasks import IMAGE, TASKS

# What may differ when a run is resumed.
RESUMABLE = ("train.steps", "eval.", "checkpoint.", "log.", "verifier.audit")
# Fields that came after the first runs, and the values by which those runs went.
LATER = {"verifier.cache_size": 0}


def from_config_dict(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """The checked, frozen form of a configuration.

    Raises:
      ConfigError: unknown or missing keys, wrong types, or values that contradict each other.
    """
    mapping = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    parsed = _parse(Config, mapping, "config")
    _check_choices(parsed)
    _check_numbers(parsed)
    _check_sizes(parsed)
    _check_verifier(parsed)
    _check_reward(parsed)
    return parsed


def from_saved(saved: Mapping[str, Any]) -> Config:
    """The configuration that a run wrote into its folder, also one without the newest fields.

    Raises:
      ConfigError: see `from_config_dict`.
    """
    completed = dict(saved)
    for key, value in LATER.items():
        section, name = key.split(".")
        completed[section] = {name: value} | completed[section]
    return from_config_dict(completed)


def to_json(config: Config) -> str:
    """The resolved configuration as text."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


def check_resumable(config: Config, saved: Mapping[str, Any]) -> None:
    """Refuses to continue a run under another configuration.

    Args:
      config: of this start.
      saved: the JSON object that the run wrote.
    Raises:
      ConfigError: a field outside `RESUMABLE` differs; all such fields are listed.
    """
    now, then = _flatten(json.loads(to_json(config))), LATER | _flatten(saved)
    different = [
        f"{key}: the run has {then.get(key)!r}, this start {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not key.startswith(RESUMABLE)
    ]
    if different:
        raise ConfigError(
            "the run folder holds a run of another configuration:\n  "
            + "\n  ".join(different)
            + "\nuse these values, or another --workdir"
        )


def _parse(cls: type, mapping: Any, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: got {mapping!r}, expected a section with keys")
    types = typing.get_type_hints(cls)
    unknown = sorted(set(mapping) - set(types))
    missing = sorted(set(types) - set(mapping))
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}; known: {sorted(types)}")
    if missing:
        raise ConfigError(f"{where}: missing keys {missing}; configs/grpo.py has them all")
    return cls(**{key: _value(types[key], mapping[key], f"{where}.{key}") for key in types})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _parse(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: got {value!r}, expected a list")
        inner = typing.get_args(kind)[0]
        return tuple(_value(inner, each, f"{where}[{i}]") for i, each in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: got {value!r}, expected {kind.__name__}")
    return value


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


SCORES = ("confidence", "binary", "holistic")
CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "verifier.kind": ("hf", "openai", "callable", "self"),
    "reward.aggregate": ("geometric", "mean", "pooled"),
    "reward.score": SCORES,
    "rollout.sampler": ("sde", "cps"),
    "rollout.guidance.renorm": ("global", "channel", "text_channel"),
    "rollout.edit_guidance.renorm": ("global", "channel", "text_channel"),
    "srr.source": ("drawn", "record"),
    "srr.choice": ("worst", "softmax"),
    "srr.rectification": ("released", "paper", "none"),
    "srr.reflection_format": ("none", "rule", "verifier"),
    "train.trainable": ("lora", "full"),
    "train.old_logprob": ("recompute", "self"),
    "loss.text": ("grpo", "none"),
    "loss.image": ("grpo", "none"),
    "loss.level": ("sequence", "token"),
    "advantage.std": ("global_raw", "global_centered", "group", "none"),
    "advantage.baseline": ("group", "initial", "anchor"),
    "eval.checker": ("shapes", ""),
}

# key -> (lowest, highest) value, both allowed
RANGES = {
    "seed": (0, (1 << 32) - 1),
    "model.height": (16, 4096),
    "model.width": (16, 4096),
    "lora.rank": (1, 4096),
    "lora.alpha": (1e-6, 1e6),
    "verifier.workers": (1, 1024),
    "verifier.threads": (1, 1024),
    "verifier.concurrency": (1, 1024),
    "verifier.question_seconds": (1e-3, 1e6),
    "verifier.top_logprobs": (1, 1 << 20),
    "verifier.top_k": (0, 1 << 20),
    "verifier.attempt_seconds": (1e-3, 1e6),
    "verifier.total_seconds": (1e-3, 1e6),
    "verifier.start_seconds": (1e-3, 1e6),
    "verifier.max_attempts": (1, 1000),
    "verifier.cache_size": (0, 1 << 40),
    "reward.format_weight": (0.0, 100.0),
    "reward.max_invalid_fraction": (0.0, 1.0),
    "rollout.prompt_tokens": (3, 1 << 20),
    "rollout.text_tokens": (1, 1 << 20),
    "rollout.num_points": (2, 1000),
    "rollout.shift": (1e-3, 1e3),
    "rollout.window": (1, 999),
    "rollout.noise_level": (1e-6, 100.0),
    "rollout.temperature": (1e-6, 100.0),
    "rollout.top_p": (1e-6, 1.0),
    "rollout.micro_batch": (1, 1 << 20),
    "srr.initial_images": (1, 1 << 20),
    "srr.queue_prompts": (1, 1 << 20),
    "srr.num_points": (2, 1000),
    "srr.text_tokens": (1, 1 << 20),
    "mixed.batches": (1, 1000),
    "train.steps": (0, 1 << 40),
    "train.prompts_per_step": (1, 1 << 20),
    "train.group_size": (2, 1 << 20),
    "train.micro_batch": (1, 1 << 20),
    "train.updates_per_batch": (1, 1000),
    "loss.text_loss_weight": (0.0, 1e6),
    "loss.clip_low": (0.0, 1.0),
    "loss.clip_high": (0.0, 1e6),
    "loss.entropy_fraction": (1e-6, 1.0),
    "loss.text_beta": (0.0, 1e6),
    "loss.image_clip": (0.0, 1.0),
    "loss.advantage_clip": (1e-6, 1e6),
    "loss.image_beta": (0.0, 1e6),
    "optimizer.learning_rate": (0.0, 10.0),
    "optimizer.gen_scale": (0.0, 1e6),
    "optimizer.b1": (0.0, 0.999999),
    "optimizer.b2": (0.0, 0.999999),
    "optimizer.eps": (0.0, 1.0),
    "optimizer.weight_decay": (0.0, 10.0),
    "optimizer.clip_norm": (1e-6, 1e9),
    "optimizer.warmup_steps": (0, 1 << 40),
    "optimizer.decay_steps": (0, 1 << 40),
    "eval.every": (0, 1 << 40),
    "eval.prompts": (1, 1 << 30),
    "eval.micro_batch": (1, 1 << 20),
    "eval.temperature": (0.0, 100.0),
    "eval.top_p": (1e-6, 1.0),
    "eval.num_points": (2, 1000),
    "checkpoint.every": (0, 1 << 40),
    "checkpoint.keep": (1, 1 << 20),
    "log.samples": (1, 4096),
}


def _check_choices(config: Config) -> None:
    known = (*TASKS, "mixed")
    if config.task not in known:
        raise ConfigError(f"task: got {config.task!r}, expected one of {known}")
    flat = _flatten(dataclasses.asdict(config))
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise ConfigError(f"{key}: got {flat[key]!r}, expected one of {choices}")


def _check_numbers(config: Config) -> None:
    flat = _flatten(dataclasses.asdict(config))
    for key, (low, high) in RANGES.items():
        if not low <= flat[key] <= high:
            raise ConfigError(f"{key}: got {flat[key]}, expected between {low} and {high}")


def _check_sizes(config: Config) -> None:
    """Values that must agree with each other."""
    total, rollout, train = config.trajectories, config.rollout, config.train
    for key, size in (("train", train.micro_batch), ("rollout", rollout.micro_batch)):
        if total % size:
            raise ConfigError(
                f"{key}.micro_batch: got {size}, which does not divide the update's "
                f"{train.prompts_per_step} prompts x {train.group_size} = {total} trajectories"
            )
    if rollout.micro_batch % train.group_size:
        raise ConfigError(
            f"rollout.micro_batch: got {rollout.micro_batch}, expected a multiple of "
            f"train.group_size={train.group_size} (a group is drawn together)"
        )
    if len(rollout.window_range) != 2:
        raise ConfigError("rollout.window_range must be (lo, hi)")
    for key, guidance in (("", rollout.guidance), ("edit_", rollout.edit_guidance)):
        if len(guidance.interval) != 2 or not guidance.interval[0] < guidance.interval[1]:
            raise ConfigError(
                f"rollout.{key}guidance.interval: got {guidance.interval}, expected two noise "
                "levels (lo, hi), lo < hi"
            )
    for key, pattern in (
        ("lora.targets", config.lora.targets),
        ("train.full_targets", train.full_targets),
    ):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{key}: {pattern!r} is no regular expression ({error})") from error
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
    """What single tasks, or several of them, need."""
    mixed, srr = config.mixed, config.srr
    if config.task == "mixed":
        unknown = sorted(set(mixed.tasks) - set(TASKS))
        if unknown or not mixed.tasks or len(set(mixed.tasks)) < len(mixed.tasks):
            raise ConfigError(
                f"mixed.tasks: got {mixed.tasks}, expected different ones of {tuple(TASKS)}"
            )
        if len(mixed.weights) != len(mixed.tasks) or not all(w > 0 for w in mixed.weights):
            raise ConfigError(
                f"mixed.weights: got {mixed.weights}, expected {len(mixed.tasks)} positive "
                "numbers, one for each of mixed.tasks"
            )
    for task in (TASKS[name] for name in config.tasks):
        if "" in config.data.pair(task.data):
            key = task.data.removesuffix("s")
            raise ConfigError(
                f"task {task.name} needs data.{key}_train and data.{key}_heldout, files of records"
            )
        for kind, steps in (("text", task.text_kinds), ("image", task.events.count(IMAGE))):
            other = {"text": "image", "image": "text"}[kind]
            if not steps and vars(config.loss)[other] == "none":
                raise ConfigError(
                    f"task {task.name} has no {kind} to train; loss.{other} must not be 'none'"
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
    size = config.rollout.micro_batch
    if size % srr.initial_images or srr.queue_prompts % (size // srr.initial_images):
        raise ConfigError(
            f"srr.initial_images={srr.initial_images} must divide rollout.micro_batch={size}, and "
            f"srr.queue_prompts={srr.queue_prompts} be a multiple of what is left, the prompts "
            "whose initial images are drawn together"
        )
    if srr.queue_prompts < config.train.prompts_per_step:
        raise ConfigError(
            f"srr.queue_prompts: got {srr.queue_prompts}, expected at least "
            f"train.prompts_per_step={config.train.prompts_per_step}"
        )


def _check_reward(config: Config) -> None:
    """What the scores that the reward is made of need."""
    reward = config.reward
    scores, weights = (reward.score, *reward.extra_scores), reward.extra_weights
    if len(set(scores)) < len(scores) or not set(scores) <= set(SCORES):
        raise ConfigError(
            f"reward.extra_scores: got {reward.extra_scores} beside reward.score={reward.score!r}, "
            f"expected different ones of {SCORES}"
        )
    if len(weights) != len(reward.extra_scores) or not all(0 < w < 1e6 for w in weights):
        raise ConfigError(
            f"reward.extra_weights: got {weights}, expected {len(reward.extra_scores)} positive "
            "numbers, one for each of reward.extra_scores (the weight of reward.score is 1)"
        )
    if "holistic" not in scores:
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


def _check_verifier(config: Config) -> None:
    """What endpoints need, and what needs endpoints."""
    verifier = config.verifier
    check_key_name(verifier.api_key_env)
    if verifier.kind == "self":
        if verifier.endpoints or verifier.audit:
            raise ConfigError(
                "verifier.kind=self: the policy answers alone and keeps no log of attempts; leave "
                "verifier.endpoints and verifier.audit empty"
            )
        if "holistic" in (config.reward.score, *config.reward.extra_scores):
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
            f"verifier.attempt_seconds={verifier.attempt_seconds}, which all of an image's "
            "questions have together"
        )


DEFAULT_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "grpo.py"


def read_config(path: str | pathlib.Path = DEFAULT_CONFIG) -> Config:
    """The configuration that a Python file's `get_config` makes.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: the file is no Python or has no `get_config`; see `config.from_config_dict`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}; give one with --config")
    try:
        found = runpy.run_path(str(path))
    except (SyntaxError, ImportError, ValueError) as error:
        raise ConfigError(f"{path} cannot be run ({error}); see configs/grpo.py") from error
    if not callable(found.get("get_config")):
        raise ConfigError(f"{path} has no function get_config; see configs/grpo.py")
    return from_config_dict(found["get_config"]())
