"""What `build` makes of a configuration without loading a model: the verifier workers."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.training import scorers, setup
from alphagrpo_jax.training import verifiers as verifiers_lib
from configs import grpo

URLS = ("http://one:8000/v1", "http://two:8000/v1")


def config_of(**fields):
    config = grpo.get_config()
    config.verifier.update(fields)
    return config_lib.from_config_dict(config)


def test_endpoints_alone_need_no_process():
    ((kind, options),) = verifiers_lib.verifier_factories(
        config_of(kind="openai", endpoints=URLS, model="judge", workers=3)
    )
    assert (kind, options["endpoints"], options["concurrency"]) == ("openai", URLS, 64)


def test_endpoints_stand_beside_local_workers():
    factories = verifiers_lib.verifier_factories(
        config_of(endpoints=URLS, model="judge", workers=2)
    )
    assert [kind for kind, _ in factories] == ["hf", "hf", "openai"]
    assert factories[2][1]["endpoints"] == URLS
    assert not factories[2][1]["must_serve"]


def test_the_pool_is_made_as_configured(tmp_path, monkeypatch):
    pool_arguments = {}
    monkeypatch.setattr(
        verifiers_lib,
        "Pool",
        lambda factories, options, **arguments: pool_arguments.update(options=options, **arguments),
    )
    verifiers_lib.make_verifier_pool(
        config_of(cache_size=7, audit=str(tmp_path / "log.jsonl"), max_attempts=3)
    )
    assert pool_arguments["options"].cache_size == 7
    assert pool_arguments["audit_path"] == str(tmp_path / "log.jsonl")
    assert pool_arguments["options"].max_attempts == 3
    verifiers_lib.make_verifier_pool(config_of())
    assert (pool_arguments["options"].cache_size, pool_arguments["audit_path"]) == (0, None)


def test_each_of_several_processes_has_an_audit_log_of_its_own(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert scorers.audit_path("logs/audit.jsonl") == "logs/audit.1.jsonl"
    assert scorers.audit_path("logs/a.jsonl", "hf_clip.x") == "logs/a.hf_clip.x.1.jsonl"
    assert scorers.audit_path("audit") == "audit.1"
    assert scorers.audit_path("") is None


def test_without_endpoints_all_workers_are_local():
    assert [kind for kind, _ in verifiers_lib.verifier_factories(config_of())] == ["hf", "hf"]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (("judge:8000",), r"verifier\.endpoints: got endpoint 'judge:8000', expected http"),
        ((URLS[0], URLS[0] + "/"), "each of them once"),
    ],
)
def test_wrong_endpoints_are_refused(urls, message):
    with pytest.raises(ConfigError, match=message):
        verifiers_lib.verifier_factories(config_of(kind="openai", endpoints=urls, model="judge"))


@pytest.mark.parametrize(
    ("height", "message"), [(64, "at most 48 pixels"), (40, "must be multiples of 16 pixels")]
)
def test_image_sizes_that_the_model_cannot_draw_are_refused(height, message):
    config = grpo.get_config()
    config.model.height = height
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    with pytest.raises(ConfigError, match=message):
        setup.load_policy(config_lib.from_config_dict(config), mesh)


@pytest.mark.parametrize(
    ("attention", "platform", "kernel"),
    [
        ("plain", "gpu", "plain"),
        ("fused", "gpu", "cudnn"),
        ("fused", "cuda", "cudnn"),
        ("fused", "tpu", "splash"),
        ("fused", "cpu", "plain"),
    ],
)
def test_the_attention_kernel_is_that_of_the_devices(attention, platform, kernel):
    config = grpo.get_config()
    config.model.attention, config.model.dtype = attention, "bfloat16"
    device = SimpleNamespace(platform=platform)
    mesh = SimpleNamespace(devices=np.array([[[device]]]))
    assert setup.attention_kernel(config_lib.from_config_dict(config), mesh) == kernel
    config.model.dtype = "float32"
    if kernel == "cudnn":
        with pytest.raises(
            ConfigError, match=r"model\.attention=fused .* model\.dtype=float32; set"
        ):
            setup.attention_kernel(config_lib.from_config_dict(config), mesh)
