"""Verifiers, and `build`, by which a worker process makes one from a picklable description."""

import importlib
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.rewards.verifiers.base import Verifier
from alphagrpo_jax.runtime.errors import UsageError

# kind -> "module:function". Imported in the worker only: the pool's process never imports torch.
KINDS = {
    "hf": "alphagrpo_jax.rewards.verifiers.hf:HFVerifier",
    "openai": "alphagrpo_jax.rewards.verifiers.openai:OpenAIVerifier",
    "hf_clip": "alphagrpo_jax.rewards.verifiers.two_tower:TwoTowerScorer",
    "function": "alphagrpo_jax.rewards.verifiers.functions:FunctionScorer",
}


def build(kind: str, options: Mapping[str, Any]) -> Verifier:
    """Builds a verifier.

    Args:
      kind: a key of `KINDS`, or "callable" with `options["target"]` = "module:function" (the other
        options are that function's arguments).
      options: keyword arguments of the kind's function.
    Raises:
      ValueError: unknown kind, or a target that is not "module:function".
    """
    options = dict(options)
    if kind == "callable":
        target = options.pop("target", None)
    elif kind in KINDS:
        target = KINDS[kind]
    else:
        raise UsageError(f"got verifier kind {kind!r}, expected one of {[*KINDS, 'callable']}")
    if not isinstance(target, str) or target.count(":") != 1:
        raise UsageError(f"got verifier target {target!r}, expected 'module:function'")
    module, _, name = target.partition(":")
    return vars(importlib.import_module(module))[name](**options)
