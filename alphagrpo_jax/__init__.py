"""AlphaGRPO in JAX: reinforcement learning of unified multimodal models that think, then draw.

The names in `__all__` are the public interface, described in `docs/api.md`; everything else may
change. A name is imported from its module on first use, so that `import alphagrpo_jax` takes
milliseconds and loads neither JAX nor PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "TASKS",
    "Advantages",
    "Answer",
    "Config",
    "HFVerifier",
    "ImageTerms",
    "MatchingTerms",
    "Policy",
    "Rating",
    "Record",
    "Reward",
    "Score",
    "Scorer",
    "Task",
    "TextTerms",
    "TwoTowerScorer",
    "UserError",
    "Verifier",
    "change_options",
    "dvreward",
    "group_advantage",
    "grpo_loss",
    "image_awm",
    "image_grpo",
    "image_nft",
    "image_remax",
    "inference",
    "read_config",
    "read_jsonl",
    "text_grpo",
    "text_remax",
    "train",
    "viescore",
]

_PUBLIC_MODULES = ("inference", "train")
_NAMES = {
    "advantage": ("Advantages", "group_advantage"),
    "config": ("Config",),
    "config_checks": ("change_options", "read_config"),
    "inference": ("Policy",),
    "loss": ("grpo_loss",),
    "losses.awm": ("image_awm",),
    "losses.image_grpo": ("image_grpo",),
    "losses.nft": ("image_nft",),
    "losses.remax": ("image_remax", "text_remax"),
    "losses.terms": ("ImageTerms", "MatchingTerms", "TextTerms"),
    "losses.text_grpo": ("text_grpo",),
    "rewards.dvreward": ("Reward", "dvreward"),
    "rewards.verifiers.base": ("Answer", "Rating", "Score", "Scorer", "Verifier"),
    "rewards.verifiers.hf": ("HFVerifier",),
    "rewards.verifiers.two_tower": ("TwoTowerScorer",),
    "rewards.viescore": ("viescore",),
    "runtime.errors": ("UserError",),
    "runtime.records": ("Record", "read_jsonl"),
    "tasks": ("TASKS", "Task"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the lists
    from alphagrpo_jax import inference, train
    from alphagrpo_jax.advantage import Advantages, group_advantage
    from alphagrpo_jax.config import Config
    from alphagrpo_jax.config_checks import change_options, read_config
    from alphagrpo_jax.inference import Policy
    from alphagrpo_jax.loss import grpo_loss
    from alphagrpo_jax.losses.awm import image_awm
    from alphagrpo_jax.losses.image_grpo import image_grpo
    from alphagrpo_jax.losses.nft import image_nft
    from alphagrpo_jax.losses.remax import image_remax, text_remax
    from alphagrpo_jax.losses.terms import ImageTerms, MatchingTerms, TextTerms
    from alphagrpo_jax.losses.text_grpo import text_grpo
    from alphagrpo_jax.rewards.dvreward import Reward, dvreward
    from alphagrpo_jax.rewards.verifiers.base import Answer, Rating, Score, Scorer, Verifier
    from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
    from alphagrpo_jax.rewards.verifiers.two_tower import TwoTowerScorer
    from alphagrpo_jax.rewards.viescore import viescore
    from alphagrpo_jax.runtime.errors import UserError
    from alphagrpo_jax.runtime.records import Record, read_jsonl
    from alphagrpo_jax.tasks import TASKS, Task


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562)."""
    if name in _PUBLIC_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
