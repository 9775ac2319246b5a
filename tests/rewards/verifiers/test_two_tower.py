"""Scores by tiny random two-tower models of several families, against plain transformers."""

import pathlib

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import pre_tokenizers, processors, trainers

from alphagrpo_jax.rewards.verifiers import two_tower
from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.two_tower import TwoTowerScorer

PROMPTS = ("a red circle", "two blue squares above a green triangle", "nothing")
MOST_TOKENS, SIDE, PATCH = 16, 24, 8
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MOST_TOKENS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def text_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE with a token at each end, as of CLIP."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<start>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PROMPTS, trainer)
    pairs = [(token, backend.token_to_id(token)) for token in special[1:]]
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=pairs
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=MOST_TOKENS,
    )


def clip(ids: dict) -> tuple:
    text = TEXT | ids | {"projection_dim": 16}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return hf.CLIPModel(config), hf.CLIPProcessor, hf.CLIPImageProcessorPil(**CROP)


def siglip(ids: dict) -> tuple:
    config = hf.SiglipConfig(text_config=TEXT | ids, vision_config=VISION)
    images = hf.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return hf.SiglipModel(config), hf.SiglipProcessor, images


def chinese_clip(ids: dict) -> tuple:
    text = TEXT | {"vocab_size": ids["vocab_size"], "pad_token_id": ids["pad_token_id"]}
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return (
        hf.ChineseCLIPModel(config),
        hf.ChineseCLIPProcessor,
        hf.ChineseCLIPImageProcessorPil(**CROP),
    )


def metaclip(ids: dict) -> tuple:
    text = TEXT | ids | {"projection_dim": 16}
    config = hf.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=16)
    return hf.MetaClip2Model(config), hf.CLIPProcessor, hf.CLIPImageProcessorPil(**CROP)


FAMILIES = {build.__name__: build for build in (clip, siglip, chinese_clip, metaclip)}


def make_folder(folder: pathlib.Path, family: str) -> pathlib.Path:
    """Writes a tiny random model whose numbers depend on every token and pixel."""
    tokenizer = text_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model, processor, images = FAMILIES[family](ids)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5)
    model.save_pretrained(folder)
    processor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def model_folder(request, tmp_path_factory) -> pathlib.Path:
    return make_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> pathlib.Path:
    return make_folder(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((40, 31, 3), (24, 24, 3), (3, 50, 3))  # the last one looks like channels first
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def plain(folder, image, prompt):
    """The cosine and the logit, by the model's own methods."""
    model = hf.AutoModel.from_pretrained(folder).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    padding = "max_length" if model.config.model_type == "siglip" else True
    tokens = processor.tokenizer(
        [prompt], padding=padding, max_length=MOST_TOKENS, truncation=True, return_tensors="pt"
    )
    pixels = processor.image_processor(
        [image], input_data_format="channels_last", return_tensors="pt"
    )
    with torch.no_grad():
        logit = model(**tokens, **pixels).logits_per_image[0, 0]
        texts, pictures = model.get_text_features(**tokens), model.get_image_features(**pixels)
    texts, pictures = (
        features if isinstance(features, torch.Tensor) else features.pooler_output
        for features in (texts, pictures)
    )
    return float(torch.cosine_similarity(texts[0], pictures[0], dim=-1)), float(logit)


def test_scores_are_those_of_plain_transformers(model_folder, images):
    values = ("cosine", "logit", "probability")
    scores = {
        value: TwoTowerScorer(model_folder, value=value).score(images, PROMPTS) for value in values
    }
    for row, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        cosine, logit = plain(model_folder, image, prompt)
        probability = 1.0 / (1.0 + np.exp(-logit))
        for value, expected in zip(values, (cosine, logit, probability), strict=True):
            assert scores[value][row].value == pytest.approx(expected, abs=1e-5, rel=1e-5)
    cosines = [score.value for score in scores["cosine"]]
    assert max(cosines) - min(cosines) > 1e-3


def test_scores_depend_on_nothing_else(clip_folder, images):
    scorer = TwoTowerScorer(clip_folder, num_threads=1)
    together = scorer.score(images, PROMPTS)
    for image, prompt, score in reversed(list(zip(images, PROMPTS, together, strict=True))):
        assert scorer.score([image], [prompt]) == [score]


def test_long_prompts_fail_or_are_cut(clip_folder, images):
    long, cut = "a red circle " * 9, TwoTowerScorer(clip_folder, truncate=True)
    failure, success = TwoTowerScorer(clip_folder).score(images[:2], [long, PROMPTS[0]])
    assert (failure.value, failure.permanent) == (None, True)
    assert f"the model reads {MOST_TOKENS}" in failure.failure
    assert success.value is not None
    assert cut.score(images[:1], [long]) == cut.score(images[:1], [long + " and more"])


def test_a_model_that_states_no_limit_reads_everything(clip_folder, images, monkeypatch):
    expected = TwoTowerScorer(clip_folder).score(images, PROMPTS)

    model, processor = two_tower.load(clip_folder, None, "cpu", "float32")
    model.config.get_text_config().max_position_embeddings = 0
    processor.tokenizer.model_max_length = int(1e30)  # what transformers puts for no limit
    monkeypatch.setattr(two_tower, "load", lambda *_: (model, processor))
    assert TwoTowerScorer(clip_folder).score(images, PROMPTS) == expected


def test_what_cannot_be_scored_says_why(clip_folder, images):
    scorer = TwoTowerScorer(clip_folder)
    (score,) = scorer.score(images[:1], ["a <end> circle"])
    assert (score.value, score.permanent) == (None, True)
    assert "control tokens ['<end>']" in score.failure
    with pytest.raises(ValueError, match=r"got an image float64\[2, 2, 3\]"):
        scorer.score([np.zeros((2, 2, 3))], ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float99"}, "expected float32, bfloat16"),
        ({"device": "warp"}, "cannot run on device 'warp'"),
    ],
)
def test_a_wrong_dtype_or_device_is_explained(clip_folder, options, message):
    with pytest.raises(VerifierLoadError, match=message):
        TwoTowerScorer(clip_folder, **options)


def test_a_model_without_a_processor_may_get_that_of_another(tmp_path, clip_folder, images):
    hf.CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(VerifierLoadError, match=r"no processor of its own.*\?processor=ORG/NAME"):
        TwoTowerScorer(tmp_path)
    scorer = TwoTowerScorer(tmp_path, processor=clip_folder)
    expected = TwoTowerScorer(clip_folder).score(images[:1], PROMPTS[:1])
    assert scorer.score(images[:1], PROMPTS[:1]) == expected


def test_other_models_are_refused(tmp_path, llava_folder, clip_folder):
    with pytest.raises(VerifierLoadError, match=r"has no config\.json"):
        TwoTowerScorer(tmp_path)
    with pytest.raises(VerifierLoadError, match="expected a two-tower model such as CLIP"):
        TwoTowerScorer(llava_folder)
    model = hf.CLIPModel.from_pretrained(clip_folder)
    state = {name: value for name, value in model.state_dict().items() if "visual_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    hf.AutoProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(VerifierLoadError, match="lacks 1 tensors"):
        TwoTowerScorer(tmp_path)
