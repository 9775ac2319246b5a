"""The three ways through the model give the same logits, and the choice between them is told."""

import inspect
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from alphagrpo_jax.rewards.verifiers import hf, passes
from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier, load
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.passes import Passes
from alphagrpo_jax.rewards.verifiers.prompting import Prompter
from alphagrpo_jax.rewards.verifiers.trials import disagreement, tolerance
from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

QUESTIONS = ("Is there a red circle in the image?", "Is it flat?", "Is there a blue square?")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)


@pytest.fixture
def ways(llava_folder) -> Passes:
    return HFVerifier(llava_folder, num_threads=1).passes


def ask(passes_: Passes, way: str, image: np.ndarray, *args) -> torch.Tensor:
    passes_.way = way
    return passes_.logits(image, *args)


@pytest.mark.parametrize("instruction", [AUDIT_INSTRUCTION, "Look.", ""])
@pytest.mark.parametrize("replies", [None, ((30,), (31,), (30,)), ((30, 5), (31,), (9, 30, 7))])
def test_all_ways_are_the_same_as_single_questions(ways, image, instruction, replies):
    assert ways.way == "packed"
    single = torch.cat(
        [
            ask(ways, "single", image, [q], instruction, replies and replies[i : i + 1])
            for i, q in enumerate(QUESTIONS)
        ]
    )
    for way in passes.WAYS:
        got = ask(ways, way, image, QUESTIONS, instruction, replies)
        torch.testing.assert_close(got, single, atol=1e-5, rtol=0)
    assert (single[0] - single[1]).abs().max() > 0.01


def test_other_image_sizes_keep_their_own_beginnings(ways, image):
    larger = np.random.default_rng(1).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    for picture in (image, larger, image):
        packed = ask(ways, "packed", picture, QUESTIONS, AUDIT_INSTRUCTION)
        separate = ask(ways, "separate", picture, QUESTIONS, AUDIT_INSTRUCTION)
        torch.testing.assert_close(packed, separate, atol=1e-5, rtol=0)


def test_what_was_asked_before_changes_no_bit(llava_folder, ways, image):
    inverse = 255 - image
    for picture in (inverse, image, inverse):
        ask(ways, "packed", picture, QUESTIONS[:2], AUDIT_INSTRUCTION)
        ask(ways, "packed", picture, QUESTIONS[1:], "Look.")
    after = ask(ways, "packed", image, QUESTIONS, AUDIT_INSTRUCTION)
    fresh = HFVerifier(llava_folder).passes.logits(image, QUESTIONS, AUDIT_INSTRUCTION)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_shipped_verifier_is_packed_in_every_precision(dtype, image, caplog):
    verifier = HFVerifier(resolve("package:verifier"), dtype=dtype)
    assert verifier.passes.way == "packed"
    assert not caplog.records
    shares = {}
    for way in passes.WAYS:
        verifier.passes.way = way
        shares[way] = [answer.p_yes for answer in verifier.answer(image, QUESTIONS)]
    limit = tolerance(verifier.model.dtype)
    for way in passes.WAYS:
        np.testing.assert_allclose(shares[way], shares["separate"], atol=limit)


def test_wrong_positions_are_found_out(llava_folder, caplog):
    """Positions by rows and columns that the model itself does not use."""
    model, processor = load(llava_folder, "cpu", "float32")
    model.model.get_rope_index = lambda input_ids: (
        torch.arange(input_ids.shape[1]).expand(1, 1, -1) // 2,
        torch.zeros(1, 1, dtype=torch.long),
    )
    with caplog.at_level(logging.WARNING):
        assert Passes(model, processor, shared_prefix=True).way == "separate"
    assert "slower way 'separate'" in caplog.text


def hesitant(model):
    """Gives nearly all mass to a token that is neither yes nor no, as "<think>" has it."""

    def raised(_module, _inputs, logits):
        bias = torch.zeros(logits.shape[-1])
        bias[3] = 40.0
        return logits + bias

    model.get_output_embeddings().register_forward_hook(raised)


@pytest.mark.parametrize("is_wrong", [True, False])
def test_ways_are_compared_by_p_yes_where_yes_and_no_have_little_mass(
    llava_folder, monkeypatch, caplog, is_wrong
):
    model, processor = load(llava_folder, "cpu", "float32")
    hesitant(model)
    if is_wrong:
        model.model.get_rope_index = lambda input_ids: (
            torch.arange(input_ids.shape[1]).expand(1, 1, -1) // 2,
            torch.zeros(1, 1, dtype=torch.long),
        )
    assert Passes(model, processor, shared_prefix=True).way == "packed"  # all probabilities agree
    monkeypatch.setattr(hf, "load", lambda *_: (model, processor))
    with caplog.at_level(logging.WARNING):
        verifier = HFVerifier(llava_folder)
    assert verifier.passes.way == ("separate" if is_wrong else "packed")
    assert ("P(yes) differs by" in caplog.text) == is_wrong


@pytest.mark.parametrize(
    ("dtype", "rounding", "wrong"),
    [(torch.float32, 2e-5, 1e-4), (torch.float16, 0.03, 0.2), (torch.bfloat16, 0.2, 1.0)],
)
@pytest.mark.parametrize("mass", [1.0, 1e-9])
def test_rounding_of_logits_is_told_from_another_p_yes(dtype, rounding, wrong, mass):
    logits = torch.tensor([[-20.0 * (mass < 1), -20.0 * (mass < 1), 0.0]])
    words = [[0], [1]]
    near, far = (logits + torch.tensor([step, 0.0, 0.0]) for step in (rounding, wrong))
    assert disagreement(logits, logits, dtype, words) is None
    if mass < 1:
        assert disagreement(near, logits, dtype, words) is None
        assert disagreement(far, logits, dtype) is None
    assert "differ" in disagreement(far, logits, dtype, words)
    nan = torch.full_like(logits, torch.nan)
    assert disagreement(nan, nan, dtype, words) is None
    assert disagreement(nan, logits, dtype, words) is not None


def test_padding_that_changes_answers_leaves_one_question_at_a_time(llava_folder, image, caplog):
    """A model that looks at padding: the yardstick is free of it, so that this is found out."""
    model, processor = load(llava_folder, "cpu", "float32")
    request = image, QUESTIONS, AUDIT_INSTRUCTION
    forward = model.forward

    def sees_padding(**inputs):
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            inputs["attention_mask"] = torch.ones_like(mask)
            inputs["position_ids"] = torch.arange(mask.shape[1])[None].expand(mask.shape) * (
                1 + (mask == 0).any().long()
            )
        elif mask is not None:
            raise ValueError("takes no mask of four axes")
        if inputs.get("past_key_values") is not None:
            raise ValueError("takes no cache")
        return forward(**inputs)

    sees_padding.__signature__ = inspect.signature(forward)
    model.forward = sees_padding
    with caplog.at_level(logging.WARNING):
        chosen = Passes(model, processor, shared_prefix=True)
    assert chosen.way == "single"
    assert "'separate': probabilities differ" in caplog.text
    del model.forward
    expected = Passes(model, processor, shared_prefix=False).logits(*request)
    torch.testing.assert_close(chosen.logits(*request), expected, atol=1e-5, rtol=0)


def test_a_model_that_cannot_answer_at_all_is_explained(llava_folder):
    model, processor = load(llava_folder, "cpu", "float32")

    def broken(**_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.forward = broken
    with pytest.raises(VerifierLoadError, match=r"cannot answer a test question.*mat1 and mat2"):
        Passes(model, processor, shared_prefix=True)


def test_attention_with_a_window_is_never_packed(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "window")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= {"sliding_window": 1000, "use_sliding_window": True}
    text["layer_types"] = ["sliding_attention"] * text["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert HFVerifier(folder).passes.way == "shared"


def test_a_model_without_a_cache_is_asked_separately_and_says_so(llava_folder, image, caplog):
    model, processor = load(llava_folder, "cpu", "float32")
    forward = type(model).forward

    def without_cache(**inputs):
        output = forward(model, **(inputs | {"past_key_values": None, "use_cache": False}))
        output.past_key_values = None
        return output

    model.forward = without_cache
    with caplog.at_level(logging.WARNING):
        chosen = Passes(model, processor, shared_prefix=True)
    assert chosen.way == "separate"
    assert caplog.text.count("takes the slower way 'separate'") == 1
    request = image, QUESTIONS, AUDIT_INSTRUCTION
    del model.forward
    normal = Passes(model, processor, shared_prefix=False).logits(*request)
    model.forward = without_cache
    torch.testing.assert_close(chosen.logits(*request), normal, atol=1e-5, rtol=0)


def test_image_tokens_that_follow_the_content_are_not_packed(llava_folder, monkeypatch, caplog):
    model, processor = load(llava_folder, "cpu", "float32")
    original = type(processor).__call__

    def by_content(self, images=None, text=None, **options):
        if images is not None and np.any(images[0][0]):
            text = [prompt.replace("<|user|>", "<|user|> a") for prompt in text]
        return original(self, images=images, text=text, **options)

    monkeypatch.setattr(type(processor), "__call__", by_content)
    assert Passes(model, processor, shared_prefix=True).way == "shared"
    assert "follow its content" in caplog.text


def test_pixels_come_from_the_whole_processor_where_the_image_alone_gives_others(
    llava_folder, image, monkeypatch
):
    model, processor = load(llava_folder, "cpu", "float32")
    request = image, QUESTIONS, AUDIT_INSTRUCTION
    expected = Passes(model, processor, shared_prefix=False).logits(*request)
    zeros = {"pixel_values": torch.zeros(1, 3, 48, 48)}
    monkeypatch.setattr(Prompter, "pixels", lambda *_: zeros)
    chosen = Passes(model, processor, shared_prefix=True)
    assert chosen.way == "packed"
    torch.testing.assert_close(chosen.logits(*request), expected, atol=1e-5, rtol=0)
