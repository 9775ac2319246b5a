"""Configurations: what is read, and what is refused with which message."""

import dataclasses
import json
import pathlib
import runpy

import pytest

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.config import ConfigError, VerifierOptions
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from configs import grpo

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def changed(**fields):
    """The default configuration with "a__b" fields changed."""
    config = grpo.get_config().to_dict()
    for name, value in fields.items():
        *sections, key = name.split("__")
        section = config
        for section_name in sections:
            section = section[section_name]
        section[key] = value
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path):
    config = config_lib.from_config_dict(runpy.run_path(str(path))["get_config"]())
    assert config.trajectories == config.train.prompts_per_step * config.train.group_size


def test_values_arrive():
    config = config_lib.from_config_dict(changed(train__steps=7, lora__alpha=32))
    assert config.train.steps == 7
    assert config.lora.alpha == 32.0
    assert isinstance(config.lora.alpha, float)
    assert config.rollout.window_range == (0, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__stepz": 3}, r"config\.train: unknown keys \['stepz'\]"),
        ({"bonus": 3}, r"config: unknown keys \['bonus'\]"),
        ({"train__steps": "many"}, r"config\.train\.steps: got 'many', expected int"),
        ({"train__steps": -1}, r"train\.steps: got -1, expected int at least 0 and at most"),
        ({"train__steps": True}, "expected int"),
        ({"task": "sing"}, r"task: got 'sing', expected one of"),
        ({"rollout__window": 6}, r"rollout\.window_range: got \(0, 5\) for a window of 6"),
        ({"rollout__window_range": (0, 12)}, r"among 11 steps"),
        ({"rollout__window_range": (1, 2, 3)}, r"got \[1, 2, 3\], expected a list of 2"),
        ({"train__updates_per_batch": 2, "train__old_logprob": "self"}, "use 'recompute'"),
        ({"loss__text": "none", "loss__image": "none"}, "nothing would be trained"),
        ({"loss__image": "nft"}, r"rollout\.sampler: got 'sde' for loss\.image=nft, expected ode"),
        ({"rollout__sampler": "ode"}, "got 'ode' for loss.image=grpo, expected sde or cps"),
        (
            {"loss__image": "awm", "rollout__sampler": "ode"},
            r"optimizer\.average_limit: got 0, but loss\.image=awm compares with the moving",
        ),
        (
            {
                "loss__image": "nft",
                "rollout__sampler": "ode",
                "optimizer__average_limit": 0.3,
                "task": "t2i",
            },
            r"rollout\.shared_noise: got True with rollout\.sampler=ode and task 't2i'",
        ),
        ({"loss__text": "remax", "loss__text_beta": 0.1}, r"loss\.text=remax: got .*0\.1"),
        (
            {"loss__text": "remax", "loss__entropy_fraction": 0.5},
            r"fraction=0\.5, expected 0 and 1",
        ),
        ({"loss__image": "remax", "loss__image_beta": 0.1}, r"loss\.image=remax: got .*0\.1"),
        ({"loss__entropy_fraction": 0.2, "train__old_logprob": "self"}, "needs train.old_logprob"),
        ({"rollout__sampler": "cps", "rollout__noise_level": 1.5}, "noise_level must be below 1"),
        ({"verifier__kind": "openai"}, r"needs verifier\.endpoints"),
        ({"verifier__kind": "self", "reward__score": "holistic"}, "the policy gives no ratings"),
        ({"verifier__kind": "self", "verifier__audit": "log"}, "keeps no log of attempts"),
        ({"reward__extra_scores": ("confidence",), "reward__extra_weights": (1.0,)}, "different"),
        (
            {"reward__extra_scores": ("warmth",), "reward__extra_weights": (1.0,)},
            r"extra_scores\[0\]: got 'warmth', expected confidence, binary, holistic, exact, ",
        ),
        ({"reward__extra_scores": ("holistic",)}, r"extra_weights: got \(\), expected 1"),
        (
            {"reward__extra_scores": ("holistic",), "reward__extra_weights": (0.0,)},
            r"extra_weights\[0\]: got 0\.0, expected float above 0\.0 and below 1000000\.0",
        ),
        ({"reward__score": "holistic", "reward__rate_quality": ()}, "got an empty list or text"),
        (
            {
                "reward__score": "holistic",
                "task": "ti2i",
                "data__edit_train": "a",
                "data__edit_heldout": "b",
            },
            "task ti2i are instructions",
        ),
        ({"verifier__endpoints": ("http://a/v1",)}, r"need verifier\.model"),
        ({"verifier__endpoints": "http://a/v1"}, r"verifier\.endpoints: got .* expected a list"),
        (
            {
                "verifier__endpoints": ("http://a/v1",),
                "verifier__model": "m",
                "verifier__question_seconds": 99.0,
            },
            r"question_seconds=99\.0 is more than",
        ),
        ({"verifier__extra_body": "{"}, r"verifier\.extra_body: got '\{', which is not JSON"),
        ({"verifier__extra_body": "[1]"}, r"extra_body: got '\[1\]', expected a JSON object"),
        ({"verifier__extra_body": '{"a": NaN}'}, "NaN is no JSON number"),
        ({"verifier__extra_body": '{"n": 2, "top_p": 1}'}, r"got the fields \['n'\], which the c"),
        ({"verifier__instruction": " "}, r"verifier\.instruction: got ' ', expected a text"),
        ({"verifier__min_mass": 1.5}, r"verifier\.min_mass: got 1\.5"),
        ({"verifier__read": "last"}, r"verifier\.read: got 'last', expected one of"),
        ({"verifier__second": "openai:http://a/v1"}, r"need verifier\.model"),
        ({"verifier__cache_size": -1}, r"verifier\.cache_size: got -1"),
        ({"data": 3}, "expected a section"),
        ({"train__steps": "7"}, r"config\.train\.steps: got '7', expected int"),
        ({"lora__alpha": True}, r"config\.lora\.alpha: got True, expected float"),
        ({"lora__alpha": float("nan")}, r"config\.lora\.alpha: got nan, expected a finite number"),
        ({"lora__targets": "("}, r"lora\.targets: got '\(', expected a regular expression"),
        ({"log__progress": 1}, r"config\.log\.progress: got 1, expected bool"),
        ({"model__path": None}, r"config\.model\.path: got None, expected str"),
        ({"loss__level": "word"}, r"level: got 'word', expected one of \('sequence', 'token'\)"),
        ({"advantage__std": "local"}, r"advantage\.std: got 'local', expected one of"),
        ({"advantage__baseline": "best"}, r"advantage\.baseline: got 'best', expected one of"),
        ({"mixed__tasks": ("rt2i", 3)}, r"config\.mixed\.tasks\[1\]: got 3, expected str"),
        (
            {"mixed__weights": (1.0, -1.0)},
            r"mixed\.weights\[1\]: got -1\.0, expected float above 0",
        ),
        ({"task": "mixed", "mixed__weights": (1.0,)}, r"mixed\.weights: got .* expected 2 numbers"),
        ({"rollout__window_range": (1,)}, r"window_range: got \[1\], expected a list of 2"),
        (
            {"rollout__guidance__interval": (0.5, 0.5)},
            r"guidance\.interval: got \(0\.5, 0\.5\), expected two noise levels",
        ),
        ({"rollout__guidance__renorm": "word"}, r"guidance\.renorm: got 'word', expected one of"),
        ({"seed": -1, "loss__clip_low": 2.0}, r"config\.seed: .*\nconfig\.loss\.clip_low: "),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.from_config_dict(changed(**fields))


def test_changed_options_are_checked_like_new_ones():
    config = config_lib.from_config_dict(grpo.get_config())
    scale = {"rollout.guidance.text_scale": 3}
    assert config_lib.change_options(config, scale).rollout.guidance.text_scale == 3.0
    with pytest.raises(
        ConfigError, match=r"config\.eval\.top_p: got 1\.5, expected float at least"
    ):
        config_lib.change_options(config, {"eval.top_p": 1.5})
    with pytest.raises(ConfigError, match=r"config\.eval: unknown keys \['top_k'\]"):
        config_lib.change_options(config, {"eval.top_k": 1})
    with pytest.raises(ConfigError, match="nothing would be trained"):
        config_lib.change_options(config, {"loss.text": "none", "loss.image": "none"})


def test_missing_keys_are_refused():
    config = grpo.get_config()
    del config.train.steps
    with pytest.raises(ConfigError, match=r"config\.train: missing keys \['steps'\]"):
        config_lib.from_config_dict(config)


KEYS = ("sk-0123456789abcdef", "sk_live_0123456789", "0123456789ABCDEF", "MY KEY", "MY-KEY")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_the_place_of_its_name_is_refused_and_not_shown(key):
    with pytest.raises(ConfigError, match="got no name of an environment variable") as caught:
        config_lib.from_config_dict(changed(verifier__api_key_env=key))
    assert key not in str(caught.value)
    assert config_lib.from_config_dict(changed(verifier__api_key_env="_MY_KEY_2"))


def test_runs_without_the_newest_fields_are_read_and_continued():
    config = config_lib.from_config_dict(grpo.get_config())
    saved = json.loads(config_lib.to_json(config))
    del saved["verifier"]["cache_size"]
    assert config_lib.from_saved(saved) == config
    config_lib.check_resumable(config, saved)
    remembers = config_lib.from_config_dict(changed(verifier__cache_size=9))
    notice = config_lib.check_resumable(remembers, saved)
    assert "verifier.cache_size: the run has 0, this start 9" in notice


def test_only_some_fields_may_differ_on_resume():
    saved = json.loads(config_lib.to_json(config_lib.from_config_dict(grpo.get_config())))
    allowed = changed(train__steps=9, eval__every=1, checkpoint__keep=9, log__progress=False)
    config_lib.check_resumable(config_lib.from_config_dict(allowed), saved)
    differing = config_lib.from_config_dict(changed(seed=5, loss__level="token"))
    message = r"loss\.level: the run has 'sequence'.*'token'\n  seed: "
    with pytest.raises(ConfigError, match=message):
        config_lib.check_resumable(differing, saved)


def test_a_run_may_go_on_with_another_way_to_its_verifier_but_no_other_verifier():
    served = {
        "verifier__kind": "openai",
        "verifier__endpoints": ("http://a/v1",),
        "verifier__model": "m",
    }
    local = json.loads(config_lib.to_json(config_lib.from_config_dict(changed())))
    config = config_lib.from_config_dict(changed(**served))
    notice = config_lib.check_resumable(config, local)
    assert notice.startswith("notice: the run goes on with other values, which may change the last")
    assert "the verifier must be the same model" in notice
    assert "verifier.kind: the run has 'hf', this start 'openai'" in notice
    saved = json.loads(config_lib.to_json(config))
    assert not config_lib.check_resumable(config, saved)
    audited = config_lib.from_config_dict(changed(**served, verifier__audit="log.jsonl"))
    assert not config_lib.check_resumable(audited, saved)
    for field, message in (
        ({"verifier__model": "n"}, r"verifier\.model: the run has 'm', this start 'n'"),
        ({"verifier__instruction": "Say yes."}, r"verifier\.instruction: the run has 'You are"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_lib.check_resumable(
                config_lib.from_config_dict(changed(**(served | field))), saved
            )


OTHER_VERIFIER = {
    "kind": "self", "path": "elsewhere", "endpoints": ("http://a/v1",), "api_key_env": "KEY",
    "extra_body": '{"priority": 1}', "concurrency": 3, "question_seconds": 7.0, "top_logprobs": 3,
    "workers": 7, "threads": 3, "device": "cuda", "dtype": "auto", "top_k": 3, "min_mass": 0.1,
    "read": "after_thinking", "max_tokens": 7, "text_fallback": True, "attempt_seconds": 90.0,
    "total_seconds": 90.0, "start_seconds": 90.0, "max_attempts": 7, "cache_size": 7,
    "second": "another",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VERIFIER)
def test_a_run_may_go_on_with_other_options_of_its_verifier(name):
    served = {"verifier__model": "m"}
    saved = json.loads(config_lib.to_json(config_lib.from_config_dict(changed(**served))))
    options = served | {f"verifier__{name}": OTHER_VERIFIER[name]}
    notice = config_lib.check_resumable(config_lib.from_config_dict(changed(**options)), saved)
    assert f"verifier.{name}: the run has " in notice


def test_every_option_of_the_verifier_but_two_may_differ():
    names = {field.name for field in dataclasses.fields(VerifierOptions)}
    assert names == {*OTHER_VERIFIER, "model", "instruction", "audit"}


def test_a_run_of_before_averages_over_the_tokens_that_it_trained():
    """Which only matters where not all are trained."""
    fields = changed(loss__entropy_fraction=0.2)
    saved = json.loads(config_lib.to_json(config_lib.from_config_dict(fields)))
    del saved["loss"]["entropy_mean"]
    assert config_lib.from_saved(saved).loss.entropy_mean == "kept"
    with pytest.raises(ConfigError, match=r"loss\.entropy_mean: the run has 'kept', this start 'a"):
        config_lib.check_resumable(config_lib.from_config_dict(fields), saved)
    fields["loss"]["entropy_mean"] = "kept"
    assert not config_lib.check_resumable(config_lib.from_config_dict(fields), saved)
    everything = json.loads(config_lib.to_json(config_lib.from_config_dict(changed())))
    del everything["loss"]["entropy_mean"]
    assert not config_lib.check_resumable(config_lib.from_config_dict(changed()), everything)


def test_a_run_may_go_on_on_other_devices_and_by_other_micro_batches():
    saved = json.loads(config_lib.to_json(config_lib.from_config_dict(changed())))
    differing = changed(
        mesh__data=2, mesh__fsdp=4, mesh__tensor=1, model__remat="full",
        model__attention="fused", rollout__micro_batch=3, train__micro_batch=5,
    )  # fmt: skip
    config = config_lib.from_config_dict(differing)
    notice, *lines = config_lib.check_resumable(config, saved).splitlines()
    assert notice.startswith("notice: ")
    assert "the last bits" in notice
    assert "verifier" not in notice
    keys = [line.strip().partition(": the run has ")[0] for line in lines]
    assert keys == [
        "mesh.data", "mesh.fsdp", "model.attention", "model.remat", "rollout.micro_batch",
        "train.micro_batch",
    ]  # fmt: skip
    assert lines[0] == "  mesh.data: the run has -1, this start 2"


def test_weights_may_lie_elsewhere_but_must_be_the_same():
    saved = json.loads(config_lib.to_json(config_lib.from_config_dict(changed())))
    moved = config_lib.from_config_dict(changed(model__path="/elsewhere"))
    notice = config_lib.check_resumable(moved, saved, weights="a1", saved_weights="a1")
    assert "model.path: the run has 'package:" in notice
    assert "this start '/elsewhere'" in notice
    for config in (moved, config_lib.from_config_dict(changed())):
        with pytest.raises(ConfigError, match=r"other weights \(digest b2\) than .*\(a1, "):
            config_lib.check_resumable(config, saved, weights="b2", saved_weights="a1")
    with pytest.raises(ConfigError, match=r"model\.path: .*no digest.*\nuse these values"):
        config_lib.check_resumable(moved, saved)  # the run of an older version


@pytest.mark.parametrize(
    "field",
    [
        {"model__dtype": "bfloat16"},
        {"model__height": 128},
        {"train__group_size": 8},
        {"rollout__text_tokens": 9},
        {"verifier__instruction": "Say yes."},
    ],
)
def test_what_changes_more_than_last_bits_is_refused_beside_what_may_differ(field):
    saved = json.loads(config_lib.to_json(config_lib.from_config_dict(changed())))
    config = config_lib.from_config_dict(changed(train__micro_batch=5, **field))
    (key,) = field
    with pytest.raises(ConfigError) as caught:
        config_lib.check_resumable(config, saved)
    first, difference, last = str(caught.value).splitlines()
    assert first == "the run folder holds a run of another configuration:"
    assert difference.strip().startswith(key.replace("__", "."))
    assert last == "use these values, or another --workdir"


def test_the_default_instruction_is_the_one_that_runs_before_it_had():
    default = config_lib.read_config().verifier.instruction
    assert default == AUDIT_INSTRUCTION == config_lib.LATER["verifier.instruction"]
