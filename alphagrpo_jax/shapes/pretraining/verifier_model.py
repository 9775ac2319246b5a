"""Builds the small verifier as a Hugging Face model: LLaVA (SigLIP vision, Qwen2 text), untrained.

`build_verifier` returns a random `LlavaForConditionalGeneration` and its `LlavaProcessor`; both
save to a folder that `AutoModelForImageTextToText` and `AutoProcessor` load. An image is 6x6
patches of 8 pixels, so that a 16-pixel cell of the shapes world is exactly 2x2 patches.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from alphagrpo_jax.shapes.scenes import RESOLUTION

PATCH = 8  # pixels
PATCHES = RESOLUTION // PATCH  # per side
WIDTH = 128
HEADS = 4
VISION_LAYERS = 4
TEXT_LAYERS = 5

PAD, UNKNOWN, END, IMAGE = "<|pad|>", "<|unk|>", "<|end|>", "<image>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, UNKNOWN, END, IMAGE, SYSTEM, USER, ASSISTANT)
ANSWERS = ("yes", "no", *(str(rating) for rating in range(11)))
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = ".,:;?!'\"()-/%"

# A message is its role's token and its content; the processor repeats an image's placeholder per
# patch. A reply begins right after the assistant's token and ends with `END`.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Builds WordPiece over lower-case words; unknown words are split into characters.

    Args:
      words: the vocabulary beside special tokens, answers, characters and punctuation.
    """
    pieces = [*SPECIAL, *ANSWERS, *sorted({word.lower() for word in words})]
    pieces += [*CHARACTERS, *PUNCTUATION, *(f"##{letter}" for letter in CHARACTERS)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Builds a processor: 48x48 pixels, uint8 mapped to [-1, 1], one `<image>` per patch."""
    images = SiglipImageProcessorPil(
        size={"height": RESOLUTION, "width": RESOLUTION},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Builds a config of about 1.5 M parameters; features precede the vision tower's last norm."""
    return LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": HEADS,
            "image_size": RESOLUTION,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),  # pyright: ignore[reportCallIssue]
        image_seq_length=PATCHES * PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


@torch.no_grad()
def initialize(model: LlavaForConditionalGeneration) -> None:
    """Initializes the weights so that grounding is learnable from the first step."""
    for name, value in model.named_parameters():
        if value.ndim >= 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(value, std=value[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            value.mul_(0.3)
        # Near the identity, a word attends to patches whose features resemble its embedding.
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            value.mul_(0.2).add_(torch.eye(WIDTH))
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    torch.nn.init.normal_(embedding, std=0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    embeddings = model.model.vision_tower.embeddings
    # Detail within a patch is amplified against its mean color, which would drown faint noise.
    patch = torch.randn_like(embeddings.patch_embedding.weight)
    mean = patch.mean((2, 3), keepdim=True)
    embeddings.patch_embedding.weight.copy_(0.25 * (patch - mean) + 0.08 * mean)
    # A patch's position is the sum of a row vector and a column vector.
    rows, columns = torch.randn(2, PATCHES, WIDTH) * 0.5
    embeddings.position_embedding.weight.copy_((rows[:, None] + columns[None]).reshape(-1, WIDTH))


def build_verifier(words: Iterable[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Builds an untrained verifier for a vocabulary; uses torch's global random generator."""
    processor = build_processor(build_tokenizer(words))
    config = build_config(processor.tokenizer)
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config)
    initialize(model)
    return model, processor
