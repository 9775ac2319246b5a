"""Tiny random judges of many families, each with its family's processor, tokenizer and template.

Weights are drawn so that answers depend on every token, its position and the image: a wrong mask,
position or token changes P(yes) visibly. No file is read and torchvision is not needed: processors
are built without their video part, and the two families whose image processors exist for
torchvision alone get another one with the same outputs.
"""

import functools
import importlib.util
import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.models.smolvlm import processing_smolvlm

QUESTIONS = (
    "Is there a red circle in the image?",
    "Is it flat?",
    "Are there exactly two blue squares to the left of the green triangle, and none behind it?",
    "does the picture show\n\na cat?  Yes or no",
    "42 dogs: is that right?",
    "Is the large cube above the small sphere?",
    "Is anything written on the sign, in letters or digits?",
    "Is the sky blue?",
    "Do both people wear hats?",
    "Is the scene outdoors and at night?",
)
CORPUS = (
    *QUESTIONS,
    "You look at the image and answer the question with Yes or No. yes no Yes No YES NO",
    " Yes. No! yes, no; The answer is yes. The answer is no. 0 1 2 3 4 5 6 7 8 9 10",
    "user assistant system USER: ASSISTANT: think thinking because therefore wait",
)
THINK = ("<think>", "</think>")


class Judge(NamedTuple):
    """A model and its processor."""

    model: Any
    processor: Any


def byte_level(
    controls: Sequence[str], *, bos: str | None = None, eos: str, **options: Any
) -> hf.PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer, as of Qwen and Llama 3.

    Args:
      controls: the control tokens.
      bos: put before every text that is tokenized with special tokens; None: nothing is.
      eos: ends a reply.
      options: of the tokenizer, e.g. its `padding_side`.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, controls, bos, eos, {"initial_alphabet": alphabet}, options)


def sentence_piece(
    controls: Sequence[str],
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    leading_blank: bool = True,
    **options: Any,
) -> hf.PreTrainedTokenizerFast:
    """Returns a tokenizer with SentencePiece's blanks, as of Llama 2 and Gemma.

    Args:
      controls, bos, eos, options: see `byte_level`.
      leading_blank: True puts a blank before each text between control tokens.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *steps] if leading_blank else steps
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    printable = [chr(code) for code in range(0x21, 0x7F)]
    return _trained(
        tokenizer, ("<unk>", *controls), bos, eos, {"initial_alphabet": printable}, options
    )


def _trained(
    tokenizer: tokenizers.Tokenizer,
    controls: Sequence[str],
    bos: str | None,
    eos: str,
    training: dict[str, Any],
    options: dict[str, Any],
) -> hf.PreTrainedTokenizerFast:
    """Trains the tokenizer on `CORPUS` and adds its control tokens."""
    special = [*dict.fromkeys([*([bos] if bos else []), eos, "<pad>", *controls])]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, show_progress=False, **training
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        identifier = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, identifier)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>", **options
    )


def without_video(processor: type, *parts: Any, **options: Any) -> Any:
    """Builds a processor whose video part, which needs torchvision, is absent.

    Args:
      processor: its class.
      parts: its image processor and tokenizer.
      options: of the processor.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "check_argument_for_proper_class", lambda *_: None)
        patch.setattr(processing_smolvlm, "num2words", str)  # spells the frames of a video
        return processor(*parts, **options)


def draw(model: Any, seed: int = 0) -> Any:
    """Draws all weights anew, so that activations neither vanish nor forget their inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            fan_in = math.prod(weight.shape[1:]) if weight.ndim != 3 else weight.shape[1]
            std = 1.0 if "embed" in name or "position" in name else fan_in**-0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        head = model.get_output_embeddings().weight
        head.copy_(torch.randn(head.shape, generator=generator) * 2 * head.shape[1] ** -0.5)
    return model.eval().float()


def ids(tokenizer: Any, *tokens: str) -> list[int]:
    """Returns the tokens' ids, which must exist."""
    numbers = tokenizer.convert_tokens_to_ids(list(tokens))
    assert None not in numbers, tokens
    return numbers


# The smallest sizes that keep several heads with shared keys, and several layers.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def text_sizes(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Returns the options of a text model for this tokenizer."""
    controls = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    return TEXT | {"vocab_size": len(tokenizer), "tie_word_embeddings": False} | controls | changes


def turns(image: str, begin: str, end: str, reply: str, *, bos: bool = False) -> str:
    """Returns a chat template of turns.

    Args:
      image: what stands for an image.
      begin, end: what stands around a turn; they may use `m.role`.
      reply: the generation prompt.
      bos: True begins with the token that begins a text.
    """
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for m in messages %}"
        + begin
        + "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        + "{% if c.type == 'image' %}"
        + image
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + reply
        + "{% endif %}"
    )


def chatml(image: str, reply: str = "") -> str:
    """Returns the template of Qwen and of many others."""
    begin = "<|im_start|>{{ m.role }}\n"
    return turns(image, begin, "<|im_end|>\n", f"<|im_start|>assistant\n{reply}")


# What the system turn becomes in templates that know users' turns alone.
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content[0].text %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}"
    "{% endif %}"
)


FAMILIES: dict[str, Callable[[], Judge]] = {}


def family(build: Callable[[], Judge]) -> Callable[[], Judge]:
    """Enters a builder in `FAMILIES`; what it built is built once, the same in every process."""

    @functools.cache
    def seeded() -> Judge:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the vectors that `draw` leaves as they are
            return build()

    FAMILIES[build.__name__] = seeded
    return seeded


def _qwen_tokenizer(**options: Any) -> hf.PreTrainedTokenizerFast:
    controls = "<|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
    return byte_level([*controls.split(), *THINK], eos="<|im_end|>", **options)


def _qwen(
    config: type,
    text: type,
    vision: Any,
    model: type,
    processor: type,
    *,
    patch: int = 14,
    **changes: Any,
) -> Judge:
    """Builds a judge of the Qwen-VL kind, whose positions follow the image's rows and columns."""
    tokenizer = _qwen_tokenizer()
    image, video, start, end = ids(
        tokenizer, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
    )
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    sizes = text_sizes(tokenizer, rope_parameters=sections, **changes)
    configuration = config(
        text_config=text(**sizes).to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    pixels = hf.Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
    )
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return Judge(
        draw(model(configuration)),
        without_video(processor, pixels, tokenizer, chat_template=template),
    )


@family
def qwen2_vl() -> Judge:
    vision = hf.Qwen2VLConfig().vision_config.__class__(
        depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2
    )
    return _qwen(
        hf.Qwen2VLConfig,
        hf.Qwen2VLConfig().text_config.__class__,
        vision,
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLProcessor,
    )


def _qwen2_5(**changes: Any) -> Judge:
    defaults = hf.Qwen2_5_VLConfig()
    vision = type(defaults.vision_config)(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=32,
        window_size=56,
        fullatt_block_indexes=[1],
    )
    return _qwen(
        hf.Qwen2_5_VLConfig,
        type(defaults.text_config),
        vision,
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLProcessor,
        **changes,
    )


@family
def qwen2_5_vl() -> Judge:
    return _qwen2_5()


@family
def qwen2_5_vl_window() -> Judge:
    """Two layers of three see 40 tokens, fewer than the prompt has."""
    return _qwen2_5(use_sliding_window=True, sliding_window=40, max_window_layers=1)


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "patch_size": 14,
}


@family
def qwen3_vl() -> Judge:
    defaults = hf.Qwen3VLConfig()
    vision = type(defaults.vision_config)(**QWEN3_VISION, deepstack_visual_indexes=[0, 1])
    return _qwen(
        hf.Qwen3VLConfig,
        type(defaults.text_config),
        vision,
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLProcessor,
    )


@family
def qwen3_vl_moe() -> Judge:
    defaults = hf.Qwen3VLMoeConfig()
    vision = type(defaults.vision_config)(**QWEN3_VISION, deepstack_visual_indexes=[0, 1])
    return _qwen(
        hf.Qwen3VLMoeConfig,
        type(defaults.text_config),
        vision,
        hf.Qwen3VLMoeForConditionalGeneration,
        hf.Qwen3VLProcessor,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )


@family
def qwen3_5() -> Judge:
    """Linear attention with a recurrent state in all layers but one."""
    defaults = hf.Qwen3_5Config()
    vision = type(defaults.vision_config)(**QWEN3_VISION)
    return _qwen(
        hf.Qwen3_5Config,
        type(defaults.text_config),
        vision,
        hf.Qwen3_5ForConditionalGeneration,
        hf.Qwen3VLProcessor,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )


@family
def glm4v() -> Judge:
    controls = (
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|begin_of_image|> <|end_of_image|> "
        "<|image|> <|begin_of_video|> <|end_of_video|> <|video|>"
    )
    tokenizer = byte_level([*controls.split(), *THINK], eos="<|endoftext|>", padding_side="left")
    image, begin, end, video, first, last = ids(
        tokenizer,
        "<|image|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|video|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    )
    defaults = hf.Glm4vConfig()
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
    text = type(defaults.text_config)(**text_sizes(tokenizer, rope_parameters=rope))
    vision = type(defaults.vision_config)(
        depth=2,
        hidden_size=32,
        num_heads=2,
        out_hidden_size=32,
        intermediate_size=48,
        image_size=56,
        patch_size=14,
    )
    config = hf.Glm4vConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=begin,
        image_end_token_id=end,
        video_start_token_id=first,
        video_end_token_id=last,
        tie_word_embeddings=False,
    )
    pixels = hf.Glm4vImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 2 * 140 * 140}
    )
    template = "[gMASK]<sop>\n" + turns(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|{{ m.role }}|>\n", "", "<|assistant|>\n"
    )
    return Judge(
        draw(hf.Glm4vForConditionalGeneration(config)),
        without_video(hf.Glm4vProcessor, pixels, tokenizer, chat_template=template),
    )


@family
def internvl() -> Judge:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    controls = ["<|im_start|>", "<|im_end|>", *names.values()]
    tokenizer = byte_level(controls, eos="<|im_end|>", extra_special_tokens=names)
    vision = hf.InternVLVisionConfig(**VISION, image_size=[56, 56], patch_size=[14, 14])
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**text_sizes(tokenizer)).to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=ids(tokenizer, "<IMG_CONTEXT>")[0],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    pixels = hf.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, min_patches=1, max_patches=4
    )
    processor = without_video(
        hf.InternVLProcessor,
        pixels,
        tokenizer,
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    return Judge(draw(hf.InternVLForConditionalGeneration(config)), processor)


COHERE = turns(
    "<image>",
    "<|START_OF_TURN_TOKEN|>{% if m.role == 'system' %}<|SYSTEM_TOKEN|>"
    "{% else %}<|USER_TOKEN|>{% endif %}",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    bos=True,
)
COHERE_CONTROLS = (
    "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|> "
    "<|CHATBOT_TOKEN|> <image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> "
    "TILE_GLOBAL TILE"
)


@family
def aya_vision() -> Judge:
    tokenizer = byte_level(
        COHERE_CONTROLS.split(), bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", padding_side="left"
    )
    config = hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(
            **text_sizes(tokenizer, sliding_window=48, logit_scale=1.0)
        ).to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=56, patch_size=14).to_dict(),
        image_token_index=ids(tokenizer, "<|IMG_PATCH|>")[0],
        downsample_factor=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    pixels = hf.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, min_patches=1, max_patches=4
    )
    processor = hf.AyaVisionProcessor(
        pixels, tokenizer, patch_size=14, img_size=56, downsample_factor=2, chat_template=COHERE
    )
    return Judge(draw(hf.AyaVisionForConditionalGeneration(config)), processor)


@family
def cohere2_vision() -> Judge:
    """Its tiles come from the same image processor as Aya's: its own needs torchvision."""
    names = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "image_token": "<image>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = byte_level(
        COHERE_CONTROLS.split(),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        extra_special_tokens=names,
        padding_side="left",
    )
    text = hf.Cohere2Config(**text_sizes(tokenizer, sliding_window=48, logit_scale=1.0))
    config = hf.Cohere2VisionConfig(
        text_config=text.to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=56, patch_size=14).to_dict(),
        image_token_id=ids(tokenizer, "<image>")[0],
        downsample_factor=2,
        alignment_intermediate_size=48,
        tie_word_embeddings=False,
    )
    pixels = hf.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56},
        min_patches=1,
        max_patches=4,
        crop_to_patches=True,
        patch_size=2,
    )
    pixels.patch_size = 2  # tokens per tile, 2 x 2
    processor = hf.Cohere2VisionProcessor(pixels, tokenizer, chat_template=COHERE)
    return Judge(draw(hf.Cohere2VisionForConditionalGeneration(config)), processor)


class Tiles(BaseImageProcessor):
    """Cuts an image into 56x56 tiles and adds the whole, in bfloat16, as Llama 4's own does."""

    model_input_names = ("pixel_values",)

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        """Returns pixel_values bfloat16[T, 3, 56, 56] and the tiles' rows and columns."""
        flat = [image for row in images for image in (row if isinstance(row, list) else [row])]
        tiles, ratios = [], []
        for image in flat:
            pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            rows, columns = (1, 2) if image.shape[1] > image.shape[0] else (1, 1)
            resize = functools.partial(
                torch.nn.functional.interpolate, mode="bilinear", antialias=True
            )
            if rows * columns > 1:
                large = resize(pixels, (56 * rows, 56 * columns))
                tiles += [tile[0] for tile in large.split(56, dim=3)]
            tiles.append(resize(pixels, (56, 56))[0])
            ratios.append((rows, columns))
        values = torch.stack(tiles).to(torch.bfloat16)
        return BatchFeature({"pixel_values": values, "aspect_ratios": torch.tensor(ratios)})

    preprocess = __call__

    def fetch_images(self, images: Any) -> Any:
        """Returns the images, which are arrays already."""
        return images


def _llama4(**changes: Any) -> Judge:
    controls = (
        "<|header_start|> <|header_end|> <|eot|> <|image_start|> <|image_end|> <|image|> <|patch|> "
        "<|tile_x_separator|> <|tile_y_separator|>"
    )
    tokenizer = byte_level(
        controls.split(), bos="<|begin_of_text|>", eos="<|eot|>", padding_side="left"
    )
    text = hf.Llama4TextConfig(
        **text_sizes(
            tokenizer,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_hidden_layers=4,
            interleave_moe_layer_step=2,
            use_qk_norm=True,
            **changes,
        )
    )
    vision = hf.Llama4VisionConfig(
        **VISION | {"intermediate_size": 128},
        image_size=56,
        patch_size=14,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
    )
    config = hf.Llama4Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=ids(tokenizer, "<|patch|>")[0],
        tie_word_embeddings=False,
    )
    template = turns(
        "<|image|>",
        "<|header_start|>{{ m.role }}<|header_end|>\n\n",
        "<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n",
        bos=True,
    )
    processor = hf.Llama4Processor(Tiles(), tokenizer, patch_size=14, chat_template=template)
    return Judge(draw(hf.Llama4ForConditionalGeneration(config)), processor)


@family
def llama4() -> Judge:
    return _llama4(attention_chunk_size=4096)


@family
def llama4_chunks() -> Judge:
    """Attention in chunks of 40 tokens, fewer than the prompt has."""
    return _llama4(attention_chunk_size=40)


def _gemma_tokenizer(**names: str) -> hf.PreTrainedTokenizerFast:
    controls = ["<start_of_turn>", "<end_of_turn>", *names.values()]
    return sentence_piece(
        controls,
        bos="<bos>",
        eos="<eos>",
        leading_blank=False,
        extra_special_tokens=names,
        padding_side="left",
    )


@family
def gemma3() -> Judge:
    """Image tokens see each other both ways; all layers but the last see 40 tokens."""
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = _gemma_tokenizer(**names)
    text = hf.Gemma3TextConfig(
        **text_sizes(tokenizer, sliding_window=40, query_pre_attn_scalar=8),
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    image, begin, end = ids(tokenizer, "<image_soft_token>", "<start_of_image>", "<end_of_image>")
    config = hf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=hf.SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, vision_use_head=False
        ).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
        tie_word_embeddings=False,
    )
    template = SYSTEM_FIRST + turns(
        "<start_of_image>",
        "<start_of_turn>{{ m.role }}\n{% if loop.first and first %}{{ first }}\n\n{% endif %}",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        bos=True,
    )
    pixels = hf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, do_pan_and_scan=False)
    processor = hf.Gemma3Processor(pixels, tokenizer, image_seq_length=4, chat_template=template)
    return Judge(draw(hf.Gemma3ForConditionalGeneration(config)), processor)


@family
def paligemma() -> Judge:
    """The prompt is a prefix whose tokens see each other both ways, as its processor writes it."""
    tokenizer = _gemma_tokenizer(image_token="<image>")
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**text_sizes(tokenizer)).to_dict(),
        vision_config=hf.SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, projection_dim=32, vision_use_head=False
        ).to_dict(),
        image_token_index=ids(tokenizer, "<image>")[0],
        projection_dim=32,
        hidden_size=32,
    )
    pixels = hf.SiglipImageProcessorPil(size={"height": 56, "width": 56})
    pixels.image_seq_length = 16
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    processor = hf.PaliGemmaProcessor(pixels, tokenizer, chat_template=template)
    return Judge(draw(hf.PaliGemmaForConditionalGeneration(config)), processor)


ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
IDEFICS_TEMPLATE = "{{ bos_token }}" + turns(
    "<image>", "{{ m.role | capitalize }}:", "<end_of_utterance>\n", "Assistant:"
)


def _idefics_parts(bos: str) -> tuple[Any, dict[str, Any]]:
    names = "<fake_token_around_image> <image> <end_of_utterance> <global-img>"
    tokenizer = byte_level(
        [*names.split(), *ROWS],
        bos=bos,
        eos="<end_of_utterance>",
        padding_side="left",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
    )
    text = hf.LlamaConfig(**text_sizes(tokenizer))
    return tokenizer, {
        "text_config": text.to_dict(),
        "image_token_id": ids(tokenizer, "<image>")[0],
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "scale_factor": 2,
    }


@family
def idefics3() -> Judge:
    tokenizer, options = _idefics_parts("<|begin_of_text|>")
    vision = {**VISION, "image_size": 56, "patch_size": 14, "model_type": "idefics3_vision"}
    config = hf.Idefics3Config(**options, vision_config=vision)
    pixels = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
    )
    processor = hf.Idefics3Processor(
        pixels, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )
    return Judge(draw(hf.Idefics3ForConditionalGeneration(config)), processor)


@family
def smolvlm() -> Judge:
    tokenizer, options = _idefics_parts("<|im_start|>")
    vision = {**VISION, "image_size": 56, "patch_size": 14, "model_type": "smolvlm_vision"}
    config = hf.SmolVLMConfig(**options, vision_config=vision)
    pixels = hf.SmolVLMImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
    )
    processor = without_video(
        hf.SmolVLMProcessor,
        pixels,
        tokenizer,
        None,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    processor.video_processor = types.SimpleNamespace(num_frames=64, fps=1)  # the template asks
    return Judge(draw(hf.SmolVLMForConditionalGeneration(config)), processor)


PIXTRAL_CONTROLS = (
    "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END] [THINK] [/THINK]"
)
MISTRAL = turns(
    "[IMG]",
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}",
    "{% if m.role == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}",
    "",
    bos=True,
)


def _pixtral_processor() -> type:
    """Returns the processor's class, whose module imports torchvision for what it does not use."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules["torchvision.transforms.v2"].functional = None
        return importlib.import_module(
            "transformers.models.pixtral.processing_pixtral"
        ).PixtralProcessor


def _pixtral_parts(merge: int) -> tuple[Any, Any, Any]:
    tokenizer = byte_level(PIXTRAL_CONTROLS.split(), bos="<s>", eos="</s>", padding_side="left")
    vision = hf.PixtralVisionConfig(**VISION, image_size=112, patch_size=14)
    pixels = hf.PixtralImageProcessorPil(
        size={"longest_edge": 84}, patch_size={"height": 14 * merge, "width": 14 * merge}
    )
    processor = without_video(
        _pixtral_processor(),
        pixels,
        tokenizer,
        patch_size=14,
        spatial_merge_size=merge,
        chat_template=MISTRAL,
    )
    return tokenizer, vision, processor


@family
def mistral3() -> Judge:
    tokenizer, vision, processor = _pixtral_parts(merge=2)
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**text_sizes(tokenizer, sliding_window=None)).to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=ids(tokenizer, "[IMG]")[0],
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return Judge(draw(hf.Mistral3ForConditionalGeneration(config)), processor)


@family
def pixtral() -> Judge:
    tokenizer, vision, processor = _pixtral_parts(merge=1)
    config = hf.LlavaConfig(
        text_config=hf.MistralConfig(**text_sizes(tokenizer, sliding_window=None)).to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=ids(tokenizer, "[IMG]")[0],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    return Judge(draw(hf.LlavaForConditionalGeneration(config)), processor)


@family
def mllama() -> Judge:
    """Cross attention to the image; its template takes no system turn beside an image."""
    controls = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|image|> <|python_tag|>"
    tokenizer = byte_level(controls.split(), bos="<|begin_of_text|>", eos="<|eot_id|>")
    sizes = text_sizes(tokenizer) | {"num_hidden_layers": 4}
    sizes.pop("head_dim")
    # The last row of the embeddings, beyond the vocabulary, is the image's.
    text = hf.MllamaConfig().text_config.__class__(
        **sizes,
        cross_attention_layers=[1, 3],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    vision = hf.MllamaConfig().vision_config.__class__(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        vision_output_dim=64,
        intermediate_layers_indices=[1],
        image_size=56,
        patch_size=14,
        max_num_tiles=4,
        supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    )
    config = hf.MllamaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=ids(tokenizer, "<|image|>")[0],
    )
    model = draw(hf.MllamaForConditionalGeneration(config))
    with torch.no_grad():  # gates begin at 0, where no image is seen
        for name, weight in model.named_parameters():
            if "gate" in name and weight.numel() == 1:
                weight.fill_(1.0)
    template = NO_SYSTEM + turns(
        "<|image|>",
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        bos=True,
    )
    pixels = hf.MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=4)
    return Judge(model, hf.MllamaProcessor(pixels, tokenizer, chat_template=template))


VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text }} {% else %}USER: "
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _clip() -> Any:
    return hf.CLIPVisionConfig(**VISION, image_size=56, patch_size=14)


@family
def llava() -> Judge:
    """LLaVA 1.5: a SentencePiece tokenizer that begins each text with BOS and a blank."""
    tokenizer = sentence_piece(["<image>"])
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text_sizes(tokenizer)).to_dict(),
        vision_config=_clip().to_dict(),
        image_token_index=ids(tokenizer, "<image>")[0],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    pixels = hf.CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    processor = hf.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return Judge(draw(hf.LlavaForConditionalGeneration(config)), processor)


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


@family
def llava_next() -> Judge:
    """LLaVA-NeXT on Mistral: tiles by the image's shape, and a window of 40 tokens."""
    tokenizer = sentence_piece(["<image>"], padding_side="left")
    config = hf.LlavaNextConfig(
        text_config=hf.MistralConfig(**text_sizes(tokenizer, sliding_window=40)).to_dict(),
        vision_config=_clip().to_dict(),
        image_token_index=ids(tokenizer, "<image>")[0],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    pixels = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% if m.role == 'user' %}[INST] {% endif %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<image>\n"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% if m.role == 'user' %} [/INST]{% else %}\n{% endif %}{% endfor %}",
    )
    return Judge(draw(hf.LlavaNextForConditionalGeneration(config)), processor)


@family
def llava_onevision() -> Judge:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>")
    image, video = ids(tokenizer, "<image>", "<video>")
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**text_sizes(tokenizer)).to_dict(),
        vision_config=hf.SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, vision_use_head=False
        ).to_dict(),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    pixels = hf.LlavaOnevisionImageProcessorPil(
        size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    processor = without_video(
        hf.LlavaOnevisionProcessor,
        pixels,
        tokenizer,
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n"),
    )
    return Judge(draw(hf.LlavaOnevisionForConditionalGeneration(config)), processor)


def plain_p_yes(logits: Tensor, tokenizer: Any) -> float:
    """Computes P(yes) of logits float32[V] from the tokens that spell yes and no in any case."""
    spelt = [re.sub(r"\W", "", tokenizer.decode([i])).lower() for i in range(len(tokenizer))]
    probabilities = logits.double().softmax(-1)
    yes, no = (
        sum(float(probabilities[i]) for i, text in enumerate(spelt) if text == word)
        for word in ("yes", "no")
    )
    return yes / (yes + no)


def picture(height: int = 90, width: int = 140, seed: int = 0) -> np.ndarray:
    """Draws a smooth image uint8[H, W, 3]."""
    coarse = np.random.default_rng(seed).random((1, 3, 5, 7))
    smooth = torch.nn.functional.interpolate(torch.tensor(coarse), (height, width), mode="bilinear")
    return (smooth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def conversation(image: np.ndarray, question: str, instruction: str, *, system: bool) -> list[dict]:
    """Returns the messages of one question; without `system` the user's turn holds both texts."""
    text = question if system else f"{instruction}\n\n{question}"
    user = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    turns = [{"role": "user", "content": user}]
    if system:
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction}]})
    return turns


def plain_logits(
    judge: Judge, image: np.ndarray, question: str, instruction: str, *, system: bool = True
) -> Tensor:
    """Computes logits float32[V] of the reply's first token as transformers' manual has it."""
    inputs = judge.processor.apply_chat_template(
        conversation(image, question, instruction, system=system),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(judge.model.dtype)
    inputs.pop("labels", None)
    with torch.inference_mode():
        return judge.model(**inputs).logits[0, -1].float()
