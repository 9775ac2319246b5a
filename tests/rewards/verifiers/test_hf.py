import json
import shutil

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from alphagrpo_jax.rewards.verifiers import hf, passes
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier, VerifierLoadError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.prompt_limits import PromptLimits
from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

QUESTIONS = ["Is there a red circle in the image?", "Is it flat?", "Is there a blue square?"]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)


@pytest.fixture
def verifier(llava_folder) -> HFVerifier:
    """A random model: whatever mass yes and no have is enough."""
    return HFVerifier(llava_folder, num_threads=1, min_mass=0.0)


class Decoder:
    """A tokenizer of which only decoding matters."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, rows):
        return [self.texts[index] for (index,) in rows]


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
    uncut = HFVerifier(llava_folder, min_mass=0.0).answer(image, QUESTIONS)
    cut = HFVerifier(llava_folder, min_mass=0.0, max_batch=2).answer(image, QUESTIONS)
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
    assert not answer.permanent  # another worker may have sound weights


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
    assert hf.torchvision_command(torch.__version__) in message
    accelerate = hf._explain(tmp_path, ImportError("`device_map` requires `accelerate`"))
    assert "pip install 'alphagrpo_jax[judges]'" in accelerate


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
        prompter = verifier.passes.prompter
        inputs = prompter.inputs(image, [prompter.prompt(question, RATE_INSTRUCTION)])
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
def test_a_question_with_a_control_token_gets_no_answer_and_others_do(
    llava_folder, image, shared_prefix
):
    options = {"num_threads": 1, "min_mass": 0.0, "max_batch": 2}
    verifier = HFVerifier(llava_folder, shared_prefix=shared_prefix, **options)
    alone = [verifier.answer(image, [question])[0].p_yes for question in QUESTIONS]
    for token in (verifier.processor.image_token, verifier.tokenizer.eos_token):
        questions = [QUESTIONS[0], f"Is it {token} yes?", *QUESTIONS[1:]]
        answers = verifier.answer(image, questions)
        refused = answers.pop(1)
        assert refused.p_yes is None
        assert refused.permanent
        assert "got the control tokens" in refused.failure
        assert token in refused.failure
        np.testing.assert_allclose([a.p_yes for a in answers], alone, atol=1e-6)
        with pytest.raises(ValueError, match="got the control tokens"):
            verifier.first_token_logits(image, questions, AUDIT_INSTRUCTION)


def test_a_prompt_longer_than_the_context_gets_no_answer_and_others_do(verifier, image):
    assert verifier.context_tokens == verifier.model.config.text_config.max_position_embeddings
    alone = [verifier.answer(image, [question])[0].p_yes for question in QUESTIONS]
    prompt = verifier.passes.prompter.prompt(QUESTIONS[0], AUDIT_INSTRUCTION)
    inputs = verifier.passes.prompter.inputs(image, [prompt])
    verifier.passes.context_tokens = inputs["input_ids"].shape[1] + 3
    for way in passes.WAYS:
        verifier.passes.way = way
        long_question = "Is there " + "a red circle " * 20 + "in it?"
        short, refused, last = verifier.answer(image, [QUESTIONS[0], long_question, QUESTIONS[1]])
        np.testing.assert_allclose([short.p_yes, last.p_yes], alone[:2], atol=1e-6)
        assert refused.p_yes is None
        assert refused.permanent
        assert f"context holds {verifier.context_tokens}" in refused.failure


def test_a_prompt_may_fill_the_context(verifier, image, llava_folder):
    prompt = verifier.passes.prompter.prompt(QUESTIONS[0], AUDIT_INSTRUCTION)
    count = PromptLimits.from_folder(llava_folder).count(prompt, *image.shape[:2])
    for way in passes.WAYS:
        verifier.passes.way, verifier.passes.context_tokens = way, count
        assert verifier.answer(image, QUESTIONS[:1])[0].p_yes is not None
        verifier.passes.context_tokens = count - 1
        assert verifier.answer(image, QUESTIONS[:1])[0].permanent


def test_a_model_that_names_no_context_takes_any_prompt(verifier, image):
    verifier.passes.context_tokens = None
    assert verifier.answer(image, ["a " * 300])[0].p_yes is not None
    assert verifier.context_tokens is None


def test_an_answer_tells_its_mass_and_too_little_of_it_is_a_failure(llava_folder, image, verifier):
    answers = verifier.answer(image, QUESTIONS)
    logits = verifier.first_token_logits(image, QUESTIONS, AUDIT_INSTRUCTION).double().softmax(-1)
    masses = logits[:, [*verifier.yes, *verifier.no]].sum(-1)
    np.testing.assert_allclose([a.mass for a in answers], masses, atol=1e-6)
    middle = float(masses.median())
    strict = HFVerifier(llava_folder, num_threads=1, min_mass=middle - 1e-9)
    for answer, mass in zip(strict.answer(image, QUESTIONS), masses, strict=True):
        assert (answer.p_yes is None) == (mass < middle - 1e-9)
        assert answer.mass == pytest.approx(float(mass), abs=1e-6)
        assert answer.p_yes is not None or "the likeliest token is" in answer.failure


def test_the_instruction_is_an_option(llava_folder, image):
    options = {"num_threads": 1, "min_mass": 0.0}
    look = HFVerifier(llava_folder, instruction="Look.", **options)
    logits = look.first_token_logits(image, QUESTIONS, "Look.").double()
    share = logits[:, look.yes].logsumexp(-1) - logits[:, look.no].logsumexp(-1)
    answers = [answer.p_yes for answer in look.answer(image, QUESTIONS)]
    np.testing.assert_allclose(answers, share.sigmoid(), atol=1e-6)
    default = [a.p_yes for a in HFVerifier(llava_folder, **options).answer(image, QUESTIONS)]
    assert max(abs(a - b) for a, b in zip(answers, default, strict=True)) > 1e-3


@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_flat_images_are_read_with_their_channels_last(verifier, height):
    """Of 1, 3 or 4 rows, a processor that guesses takes the rows for channels."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, 40, 3)).astype(np.uint8)
    prompt = verifier.passes.prompter.prompt(QUESTIONS[0], AUDIT_INSTRUCTION)
    got = verifier.passes.prompter.inputs(pixels, [prompt])["pixel_values"]
    torch.testing.assert_close(verifier.passes.prompter.pixels(pixels)["pixel_values"], got)
    pil = PIL.Image.fromarray(pixels)  # says itself what its rows are
    expected = verifier.processor(text=prompt, images=[[pil]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, expected)
    assert verifier.answer(pixels, QUESTIONS)[0].p_yes is not None


def test_device_auto_spreads_the_model(llava_folder, image, monkeypatch):
    calls = {}
    original = hf.AutoModelForImageTextToText.from_pretrained

    def from_pretrained(*args, **options):
        calls.update(options)
        options.pop("device_map")
        return original(*args, **options)

    monkeypatch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    verifier = HFVerifier(llava_folder, device="auto", dtype="auto", min_mass=0.0)
    assert calls["device_map"] == "auto"
    assert calls["dtype"] == "auto"
    assert verifier.answer(image, QUESTIONS)[0].p_yes is not None


def test_a_model_split_over_devices_answers_the_same(llava_folder, image, verifier, tmp_path):
    """As over several GPUs, here with some layers' weights on the disk."""
    expected = [answer.p_yes for answer in verifier.answer(image, QUESTIONS)]
    auto = HFVerifier(llava_folder, device="auto", min_mass=0.0)
    np.testing.assert_allclose(
        [a.p_yes for a in auto.answer(image, QUESTIONS)], expected, atol=1e-6
    )
    model, processor = hf.load(llava_folder, "cpu", "float32")
    places = {name: "cpu" for name, _ in model.named_children()}
    places |= {"model": "disk"} if "model" in places else {}
    split = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    got = passes.Passes(split, processor, shared_prefix=True)
    logits = got.logits(image, QUESTIONS, AUDIT_INSTRUCTION)
    whole = verifier.first_token_logits(image, QUESTIONS, AUDIT_INSTRUCTION)
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("torch_version", "command"),
    [
        ("2.13.0", "pip install --no-deps torchvision==0.28.0"),
        (
            "2.13.0+cpu",
            "pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "
            "torchvision==0.28.0",
        ),
        (
            "2.9.1+cu126",
            "pip install --no-deps --index-url https://download.pytorch.org/whl/cu126 "
            "torchvision==0.24.1",
        ),
        ("2.14.0a0+gitabc", "see https://pytorch.org/get-started/previous-versions"),
    ],
)
def test_the_torchvision_that_is_advised_fits_the_pytorch_that_is_there(torch_version, command):
    assert hf.torchvision_command(torch_version).startswith(command)


def test_generate_agrees_with_the_first_token(verifier, image):
    tokens, logits = verifier.generate(image, QUESTIONS[0], AUDIT_INSTRUCTION, 3)
    first = verifier.first_token_logits(image, QUESTIONS[:1], AUDIT_INSTRUCTION)
    assert len(tokens) == len(logits) <= 3
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logits[:1], first, atol=1e-4, rtol=1e-4)


def test_replies_are_greedy_whatever_the_folder_says():
    verifier = HFVerifier(resolve("package:verifier"), num_threads=1)
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    arguments = (image, "Is there a red circle?", AUDIT_INSTRUCTION, 6)
    tokens, logits = verifier.generate(*arguments)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    config = verifier.model.generation_config
    config.repetition_penalty, config.num_beams, config.no_repeat_ngram_size = 100.0, 2, 1
    penalized, _ = verifier.generate(*arguments)
    assert penalized.tolist() == tokens.tolist()
