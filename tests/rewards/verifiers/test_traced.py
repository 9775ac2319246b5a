"""A recorded program gives the model's bits, or is not used."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judge_families import FAMILIES

from alphagrpo_jax.rewards.verifiers import hf, traced
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

QUESTIONS = ("Is there a red circle in the image?", "Is it flat?", "Is there a blue square?")
LISTS = (QUESTIONS, QUESTIONS[:1], QUESTIONS[1:], QUESTIONS * 3, ("Is it round and large?",))


def noise(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def both(model, processor) -> tuple[Passes, Passes]:
    """Passes by recorded programs, and by the model's modules."""
    options = {"shared_prefix": True}
    return Passes(model, processor, **options), Passes(model, processor, traced=False, **options)


def programs(passes: Passes) -> list[bool]:
    """For each kind of image inputs, whether a program serves it."""
    return [program is not None for program in passes._traced._programs.values()]


def test_the_shipped_verifier_is_recorded_to_the_bit():
    recorded, plain = both(*hf.load(resolve("package:verifier"), "cpu", "float32"))
    assert programs(recorded) == []
    for seed, questions in enumerate(LISTS):
        for instruction in (AUDIT_INSTRUCTION, RATE_INSTRUCTION, ""):
            request = noise(seed), questions, instruction
            assert torch.equal(recorded.logits(*request), plain.logits(*request))
        reply = [[(5,), (9, 7)][row % 2] for row in range(len(questions))]
        assert torch.equal(recorded.logits(*request, reply), plain.logits(*request, reply))
    # The instruction decides how many tokens stand before the image.
    assert programs(recorded) == [True, True, True]
    assert plain._traced is None
    assert (recorded.logits(*request) - recorded.logits(noise(9), *request[1:])).abs().max() > 0.01


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "idefics3", "internvl", "pixtral"])
def test_images_of_every_size_get_the_models_bits(name):
    judge = FAMILIES[name]()
    recorded, plain = both(judge.model, judge.processor)
    assert recorded.way == "packed"
    for height, width in ((48, 48), (96, 48), (48, 96), (80, 112), (48, 48)):
        for questions in LISTS[:3]:
            request = noise(height, height, width), questions, ""
            assert torch.equal(recorded.logits(*request), plain.logits(*request))
    assert programs(recorded)


def test_a_program_is_for_numbers_of_rows_and_columns():
    sizes = [torch.tensor([[1, 4, 6]]), torch.tensor([[1, 6, 4]])]
    inputs = {"past_key_values": None, "input_ids": torch.zeros(1, 24), "pixels": torch.ones(24, 3)}
    kinds = {traced._kind({**inputs, "grid": size}) for size in sizes}
    assert len(kinds) == 2
    longer = {**inputs, "input_ids": torch.zeros(1, 30), "pixels": torch.zeros(24, 3)}
    assert traced._kind({**longer, "grid": sizes[0]}) in kinds


class Branching(torch.nn.Module):
    """A model whose code depends on how many tokens there are, or on their values."""

    config = None

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, input_ids, logits_to_keep, past_key_values, pixels):
        assert past_key_values is None
        tokens = input_ids[:, logits_to_keep].float()
        if self.branch == "count" and input_ids.shape[1] > 4:
            tokens = tokens * 2
        if self.branch == "value" and bool(input_ids.sum() > 10):
            tokens = tokens * 2
        if self.branch == "image" and bool(pixels.max() > 0.5):
            tokens = tokens * 2
        if self.branch == "split":
            tokens = tokens + sum(part.sum() for part in pixels.nonzero(as_tuple=True)[0].split(1))
        if self.branch == "error" and isinstance(input_ids.shape[1], torch.Tensor):
            raise RuntimeError("not recordable")
        return SimpleNamespace(logits=tokens[..., None])


def pass_inputs(count: int, bright: int = 0) -> dict:
    """Inputs of a pass over `count` tokens and an image with so many bright pixels."""
    return {
        "input_ids": torch.arange(count)[None],
        "logits_to_keep": torch.tensor([0, count - 1]),
        "past_key_values": None,
        "pixels": (torch.arange(4) < bright).float(),
    }


@pytest.mark.parametrize("branch", ["none", "count", "value", "image", "error"])
def test_a_model_with_branches_keeps_to_its_modules(branch):
    model = Branching(branch)
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    passes = traced.TracedPass(model)

    trials = [pass_inputs(2), pass_inputs(9), pass_inputs(3, bright=2)]
    for count in (3, 8, 5, 3):
        got = passes.logits(pass_inputs(count), lambda: trials)
        assert torch.equal(got, model(**pass_inputs(count)).logits)
    assert [program is not None for program in passes._programs.values()] == [branch == "none"]


def test_more_sizes_than_programs_are_answered_by_the_model(monkeypatch):
    monkeypatch.setattr(traced, "MAX_PROGRAMS", 1)
    judge = FAMILIES["qwen2_vl"]()
    recorded, plain = both(judge.model, judge.processor)
    for height in (48, 96, 48, 128):
        request = noise(0, height, 48), QUESTIONS, ""
        assert torch.equal(recorded.logits(*request), plain.logits(*request))
    assert programs(recorded) == [True]


def test_a_program_that_fails_gives_way_to_the_model(caplog):
    model = Branching("split")
    passes = traced.TracedPass(model)
    # No trial has more bright pixels than the image that was recorded.
    for bright, works in ((2, True), (2, True), (3, False), (2, False)):
        inputs = pass_inputs(3, bright)
        got = passes.logits(inputs, lambda: [pass_inputs(5, bright=2)])
        assert torch.equal(got, model(**inputs).logits)
        assert [program is not None for program in passes._programs.values()] == [works]
    assert "is not used again" in caplog.text


def test_inputs_that_are_no_tensors_are_left_to_the_model():
    assert traced._kind({**pass_inputs(3), "sizes": [(48, 48)]}) is None


def test_large_and_spread_models_are_not_recorded(monkeypatch):
    model = torch.nn.Linear(4, 4)
    assert traced.is_recordable(model)
    assert not traced.is_recordable(torch.nn.Linear(4, 4, device="meta"))
    model._hf_hook = object()
    assert not traced.is_recordable(model)
    monkeypatch.setattr(traced, "MAX_PARAMETERS", 19)
    assert not traced.is_recordable(torch.nn.Linear(4, 4))
