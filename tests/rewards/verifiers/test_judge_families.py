"""Judges of many families answer as plain transformers does, asked one question at a time."""

import numpy as np
import pytest
import torch
from judge_families import FAMILIES, QUESTIONS, picture, plain_logits, plain_p_yes

from alphagrpo_jax.rewards.verifiers import hf, passes
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.runtime.errors import InputError

pytestmark = pytest.mark.torch

# Families with windows, chunks, image tokens that see each other or cross attention cannot be
# packed; the state of linear attention cannot be repeated; where the image sees the question,
# nothing is shared.
WAYS = dict.fromkeys(FAMILIES, "packed")
WAYS |= dict.fromkeys(
    ("qwen2_5_vl_window", "aya_vision", "cohere2_vision", "llama4", "llama4_chunks", "gemma3"),
    "shared",
)
WAYS |= {"llava_next": "shared", "mllama": "shared", "qwen3_5": "forked", "paligemma": "separate"}
NO_SYSTEM_TURN = ("mllama",)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(monkeypatch):
    """build(family, **options): a verifier over a family's model, and the judge itself."""

    def build(name: str, **options):
        judge = FAMILIES[name]()
        monkeypatch.setattr(hf, "load", lambda *_: judge)
        return HFVerifier(name, **{"min_mass": 0.0, **options}), judge

    return build


def expected_answers(name: str, image: np.ndarray, questions=QUESTIONS) -> list[float]:
    judge = FAMILIES[name]()
    system = name not in NO_SYSTEM_TURN
    return [
        plain_p_yes(
            plain_logits(judge, image, question, AUDIT_INSTRUCTION, system=system),
            judge.processor.tokenizer,
        )
        for question in questions
    ]


def test_there_are_enough_families():
    assert len(FAMILIES) >= 20


@pytest.mark.parametrize("name", FAMILIES)
def test_p_yes_is_that_of_plain_transformers(build, name):
    verifier, _ = build(name)
    assert verifier.passes.way == WAYS[name]
    for image in (picture(), picture(64, 64, seed=1)):
        expected = expected_answers(name, image)
        answers = verifier.answer(image, QUESTIONS)
        np.testing.assert_allclose([a.p_yes for a in answers], expected, atol=1e-5, rtol=0)
        assert max(expected) - min(expected) > 0.01  # the questions count
    changed = [a.p_yes for a in verifier.answer(picture(seed=2), QUESTIONS)]
    first = [a.p_yes for a in verifier.answer(picture(), QUESTIONS)]
    assert max(abs(a - b) for a, b in zip(changed, first, strict=True)) > 1e-3  # the image counts


@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", "qwen3_vl", "glm4v", "aya_vision", "llava", "mllama", "gemma3", "llama4_chunks"],
)
def test_every_way_that_a_family_allows_is_right(build, name):
    verifier, _ = build(name)
    expected = expected_answers(name, picture(), QUESTIONS[:4])
    for way in passes.WAYS[passes.WAYS.index(WAYS[name]) :]:
        verifier.passes.way = way
        got = [answer.p_yes for answer in verifier.answer(picture(), QUESTIONS[:4])]
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0, err_msg=way)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "gemma3", "llava_next", "idefics3"])
@pytest.mark.parametrize("height", [1, 3, 4])
def test_images_of_few_rows(build, name, height):
    verifier, judge = build(name)
    pixels = np.random.default_rng(height).integers(0, 256, (height, 40, 3)).astype(np.uint8)
    prompt = verifier.passes.prompter.prompt(QUESTIONS[0], AUDIT_INSTRUCTION)
    got = verifier.passes.prompter.inputs(pixels, [prompt])
    bos = judge.processor.tokenizer.bos_token
    expected = judge.processor(
        text=[prompt],
        images=[[pixels]],
        input_data_format="channels_last",
        return_tensors="pt",
        add_special_tokens=not (bos and prompt.startswith(bos)),
    )
    assert got.keys() >= {"input_ids", "pixel_values"}
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key].to(value.dtype))
    with torch.inference_mode():
        p_yes = plain_p_yes(judge.model(**got).logits[0, -1], judge.processor.tokenizer)
    answers = verifier.answer(pixels, QUESTIONS[:2])
    assert answers[0].p_yes == pytest.approx(p_yes, abs=1e-5)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "idefics3", "mllama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_same_way_or_a_safer_one(build, name, dtype):
    judge = FAMILIES[name]()
    exact = expected_answers(name, picture(), QUESTIONS[:3])
    judge.model.to(dtype)
    try:
        verifier, _ = build(name)
        assert passes.WAYS.index(verifier.passes.way) >= passes.WAYS.index(WAYS[name])
        answers = [answer.p_yes for answer in verifier.answer(picture(), QUESTIONS[:3])]
    finally:
        FAMILIES[name].cache_clear()
    np.testing.assert_allclose(answers, exact, atol=0.1)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "mllama"])
def test_ratings_of_families(build, name):
    """0 to 10 are read at the first token; 10, of two tokens here, by what follows the 1."""
    verifier, judge = build(name)
    tokenizer = judge.processor.tokenizer
    with torch.no_grad():  # mass on the numbers
        verifier.model.get_output_embeddings().weight[[i for r in verifier.ratings for i in r]] *= 4
    try:
        (rating,) = verifier.rate(picture(), QUESTIONS[:1])
        system = name not in NO_SYSTEM_TURN
        first = plain_logits(judge, picture(), QUESTIONS[0], RATE_INSTRUCTION, system=system)
    finally:
        FAMILIES[name].cache_clear()
    shares = first.double().softmax(-1)
    spelt = [tokenizer.decode([i]).strip(" .\n,;:!?") for i in range(len(tokenizer))]
    mass = np.array(
        [sum(float(shares[i]) for i, text in enumerate(spelt) if text == str(n)) for n in range(11)]
    )
    assert mass.sum() > 0.2
    if mass[10]:
        assert rating.value == pytest.approx(float(mass @ np.arange(11) / mass.sum()), abs=1e-4)
    else:
        assert 0 <= rating.value <= 10


@pytest.mark.parametrize("ways", [{}, {"shared_prefix": False}], ids=["packed", "single"])
def test_an_image_that_the_processor_refuses_is_told_as_the_inputs_fault(build, ways):
    verifier, _ = build("qwen2_vl", **ways)
    for shape in ((1, 300, 3), (300, 1, 3), (4, 900, 3)):
        image = np.zeros(shape, np.uint8)
        with pytest.raises(InputError, match=f"refuses the image of {shape[1]}x{shape[0]} pixels"):
            verifier.answer(image, QUESTIONS)
    assert verifier.answer(picture(), QUESTIONS)[0].p_yes is not None
