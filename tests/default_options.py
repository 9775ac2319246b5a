"""Sections of the default configuration with changes, for tests of the functions that read them."""

import dataclasses
from typing import Any

from alphagrpo_jax.config import (
    AdvantageOptions,
    Guidance,
    ImageOptions,
    LossOptions,
    OptimizerOptions,
    PoolOptions,
    RewardOptions,
)
from alphagrpo_jax.config_checks import read_config
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.rewards.workers.worker import Factory

DEFAULT = read_config()


def advantage_options(**changes: Any) -> AdvantageOptions:
    """The default section `advantage` with changes."""
    return dataclasses.replace(DEFAULT.advantage, **changes)


def loss_options(**changes: Any) -> LossOptions:
    """The default section `loss` with changes."""
    return dataclasses.replace(DEFAULT.loss, **changes)


def optimizer_options(**changes: Any) -> OptimizerOptions:
    """The default section `optimizer` with changes."""
    return dataclasses.replace(DEFAULT.optimizer, **changes)


def reward_options(**changes: Any) -> RewardOptions:
    """The default section `reward` with changes."""
    return dataclasses.replace(DEFAULT.reward, **changes)


def guidance(**changes: Any) -> Guidance:
    """The default guidance of images, with a text scale of 4 and further changes."""
    return dataclasses.replace(DEFAULT.rollout.guidance, **{"text_scale": 4.0, **changes})


def image_options(**changes: Any) -> ImageOptions:
    """The image options of the default section `rollout` with changes."""
    names = [field.name for field in dataclasses.fields(ImageOptions)]
    return ImageOptions(**{name: getattr(DEFAULT.rollout, name) for name in names} | changes)


def start_pool(factory: Factory | list[Factory], *, workers: int = 2, **changes: Any) -> Pool:
    """A pool of `workers` alike, or of the listed factories, with changed options or arguments."""
    factories = [factory] * workers if isinstance(factory, tuple) else factory
    names = [field.name for field in dataclasses.fields(PoolOptions)]
    options = {name: changes.pop(name, getattr(DEFAULT.verifier, name)) for name in names}
    return Pool(factories, PoolOptions(**options), **changes)
