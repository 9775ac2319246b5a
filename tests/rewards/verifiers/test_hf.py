import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alphagrpo_jax.rewards.verifiers import hf
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier, VerifierLoadError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION

pytestmark = pytest.mark.torch

QUESTIONS = ["Is there a red circle in the image?", "Is it flat?", "Is there a blue square?"]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)


@pytest.fixture
def verifier(llava_folder) -> HFVerifier:
    return HFVerifier(llava_folder, num_threads=1)


class Decoder:
    """A tokenizer of which only decoding matters."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, rows):
        return [self.texts[index] for (index,) in rows]


def test_normalize_word_strips_blanks_punctuation_and_case():
    texts = (" Yes.", "NO!\n", "\u2581yes", "y es", "**No**")
    words = ["yes", "no", "yes", "y es", "no"]
    assert [hf.normalize_word(text) for text in texts] == words


def test_token_sets_hold_every_spelling():
    decoder = Decoder(["Yes", " yes", "yes.", "yesterday", "No", "\n no", "not", "now", "yes"])
    assert hf.token_sets(hf.normalized_tokens(decoder), ("yes", "no")) == [[0, 1, 2, 8], [4, 5]]


def test_candidates_keep_only_the_likeliest():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    torch.testing.assert_close(hf.candidates(logits, 2), torch.tensor([[0.4, 0.3, 0.0, 0.0]]))
    torch.testing.assert_close(hf.candidates(logits, None), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))


def test_p_yes_is_the_share_of_yes_among_yes_and_no(verifier, image):
    logits = verifier.first_token_logits(image, QUESTIONS, AUDIT_INSTRUCTION).double()
    yes, no = (verifier.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    expected = 1 / (1 + torch.exp(logits[:, no] - logits[:, yes]))
    answers = verifier.answer(image, QUESTIONS)
    np.testing.assert_allclose([a.p_yes for a in answers], expected, atol=1e-6)
    assert len({a.p_yes for a in answers}) == 3
    assert all(a.failure is None for a in answers)


def test_answers_do_not_depend_on_the_load(verifier, image):
    inverse = 255 - image
    first = verifier.answer(image, QUESTIONS)
    verifier.answer(inverse, QUESTIONS * 5)
    torch.randn(300, 300) @ torch.randn(300, 300)
    assert verifier.answer(image, QUESTIONS) == first  # bit for bit
    assert verifier.answer(inverse, QUESTIONS) != first


def test_batches_are_cut_at_max_batch(llava_folder, image):
    uncut = HFVerifier(llava_folder).answer(image, QUESTIONS)
    cut = HFVerifier(llava_folder, max_batch=2).answer(image, QUESTIONS)
    np.testing.assert_allclose([a.p_yes for a in cut], [a.p_yes for a in uncut], atol=1e-6)


def test_neither_yes_nor_no_is_a_failure(llava_folder, image):
    verifier = HFVerifier(llava_folder, top_k=5)
    with torch.no_grad():  # all mass on one other token
        verifier.model.lm_head.weight.zero_()
        states = verifier.model.lm_head.register_forward_hook(_only(30))
    answers = verifier.answer(image, QUESTIONS)
    states.remove()
    assert [a.p_yes for a in answers] == [None] * 3
    assert "neither yes nor no" in answers[0].failure


@pytest.mark.parametrize(("word", "p_yes"), [("yes", 1.0), ("no", 0.0), ("circle", None)])
def test_text_fallback_reads_the_reply(llava_folder, image, monkeypatch, word, p_yes):
    verifier = HFVerifier(llava_folder, top_k=5, text_fallback=True)
    with torch.no_grad():
        verifier.model.lm_head.weight.zero_()
    verifier.model.lm_head.register_forward_hook(_only(30))
    monkeypatch.setattr(HFVerifier, "_reply", lambda *_: f" {word.title()}. ")
    assert verifier.answer(image, QUESTIONS[:1])[0].p_yes == p_yes


def test_generate_returns_text(llava_folder, image):
    verifier = HFVerifier(llava_folder, text_fallback=True)
    token = verifier.tokenizer.convert_tokens_to_ids("circle")
    verifier.model.lm_head.register_forward_hook(_only(token))
    assert verifier._reply(image, QUESTIONS[0]).split()[:2] == ["circle", "circle"]


def test_nan_is_a_failure(verifier, image):
    with torch.no_grad():
        verifier.model.lm_head.weight[:] = torch.nan
    answer = verifier.answer(image, QUESTIONS[:1])[0]
    assert answer.p_yes is None
    assert "NaN" in answer.failure


def test_rating_is_an_expected_value(verifier, image):
    ids = [verifier.tokenizer.convert_tokens_to_ids(str(n)) for n in range(11)]

    def only_three_and_seven(_module, _inputs, output):
        output = torch.full_like(output, -30.0)
        output[..., ids[3]], output[..., ids[7]] = np.log(0.25), np.log(0.75)
        return output

    verifier.model.lm_head.register_forward_hook(only_three_and_seven)
    assert verifier.rate(image, QUESTIONS[:1])[0].value == pytest.approx(6.0, abs=1e-5)


@pytest.mark.parametrize(
    "bad", [np.zeros((48, 48), np.uint8), np.zeros((48, 48, 3), np.float32)], ids=["gray", "float"]
)
def test_other_images_are_refused(verifier, bad):
    with pytest.raises(ValueError, match=r"expected uint8\[H, W, 3\]"):
        verifier.answer(bad, QUESTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "got dtype 'float12', expected float32"),
        ({"device": "gpu"}, "cannot run on device 'gpu'"),
    ],
)
def test_a_wrong_dtype_or_device_is_explained(llava_folder, options, message):
    with pytest.raises(VerifierLoadError, match=message):
        HFVerifier(llava_folder, **options)


def test_missing_folder(tmp_path):
    with pytest.raises(VerifierLoadError, match=r"has no config\.json"):
        HFVerifier(tmp_path / "nowhere")


def test_missing_weights_and_missing_tokens(llava_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(llava_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(VerifierLoadError, match="cannot load the verifier"):
        HFVerifier(folder)


def test_processor_without_chat_template(llava_folder, tmp_path):
    folder = tmp_path / "silent"
    shutil.copytree(llava_folder, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(VerifierLoadError, match="chat_template"):
        HFVerifier(folder)


def test_missing_torchvision_is_explained(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    error = ImportError("Qwen2VLVideoProcessor requires the Torchvision library")
    message = hf._explain(tmp_path, error)
    assert "'qwen3_vl'" in message
    assert "pip install torchvision" in message


def _only(token: int):
    """A hook that puts all probability on one token."""

    def hook(_module, _inputs, output):
        return torch.full_like(output, -60.0).index_fill(-1, torch.tensor([token]), 60.0)

    return hook


def test_a_weight_file_cut_short_is_explained(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VerifierLoadError, match="damaged or cut short; fetch it again"):
        HFVerifier(folder)


def test_missing_tensors_are_never_drawn_at_random(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "lacking")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "mlp" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(VerifierLoadError, match="lacks 1 tensors of its model"):
        HFVerifier(folder)


@pytest.fixture
def split_ten(llava_folder, tmp_path) -> HFVerifier:
    """A verifier whose tokenizer spells 10 as "1", "0", and which likes to say both."""
    folder = shutil.copytree(llava_folder, tmp_path / "split")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ten"] = vocabulary.pop("10")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    verifier = HFVerifier(folder, num_threads=1)
    liked = torch.zeros(verifier.model.lm_head.out_features)
    liked[verifier.tokenizer.convert_tokens_to_ids(["0", "1", "7"])] = 8.0
    verifier.model.lm_head.register_forward_hook(lambda *args: 0.3 * args[-1] + liked)
    return verifier


@pytest.mark.parametrize("way", ["packed", "shared", "separate"])
def test_ten_as_two_tokens_is_rated_by_what_follows_the_one(split_ten, image, way):
    verifier = split_ten
    verifier.passes.way = way
    assert verifier.ratings[10] == []
    texts = [verifier.tokenizer.decode([i]).strip("# ") for i in range(len(verifier.tokenizer))]
    spelt = [[i for i, text in enumerate(texts) if text == str(n)] for n in range(10)]
    digits = [i for i, text in enumerate(texts) if text[:1].isdigit()]
    digit_one = verifier.tokenizer.convert_tokens_to_ids("1")
    ratings = verifier.rate(image, QUESTIONS)
    for question, rating in zip(QUESTIONS, ratings, strict=True):
        inputs = verifier.passes.inputs(image, [verifier.passes.prompt(question, RATE_INSTRUCTION)])
        longer = inputs | {
            "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[digit_one]])], 1),
            "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.int64),
        }
        with torch.inference_mode():
            first = verifier.model(**inputs).logits[0, -1].double().softmax(-1)
            second = verifier.model(**longer).logits[0, -1].double().softmax(-1)
        mass = [float(first[ids].sum()) for ids in spelt]
        unsplit = sum(n * share for n, share in enumerate(mass)) / sum(mass)
        mass.append(mass[1] * float(second[spelt[0]].sum()))
        mass[1] *= 1 - float(second[digits].sum())
        expected = sum(n * share for n, share in enumerate(mass)) / sum(mass)
        assert rating.value == pytest.approx(expected, abs=1e-5)
        assert abs(rating.value - unsplit) > 0.1  # the split counts here


def test_ratings_need_the_digits(verifier, image):
    verifier.ratings[7] = []
    with pytest.raises(ValueError, match=r"no single token for \['7'\]"):
        verifier.rate(image, QUESTIONS)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_control_tokens_in_a_question_are_refused(llava_folder, image, shared_prefix):
    verifier = HFVerifier(llava_folder, num_threads=1, shared_prefix=shared_prefix)
    control = [verifier.processor.image_token, verifier.tokenizer.eos_token]
    for token in control:
        with pytest.raises(ValueError, match="got the control tokens"):
            verifier.answer(image, [QUESTIONS[0], f"Is it {token} yes?"])


def test_generate_agrees_with_the_first_token(verifier, image):
    tokens, logits = verifier.generate(image, QUESTIONS[0], AUDIT_INSTRUCTION, 3)
    first = verifier.first_token_logits(image, QUESTIONS[:1], AUDIT_INSTRUCTION)
    assert len(tokens) == len(logits) <= 3
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logits[:1], first, atol=1e-4, rtol=1e-4)
