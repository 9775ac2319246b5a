"""Text chats with local models: a tiny causal LM, image-text-to-text ones, broken folders."""

import json
import shutil
import threading

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers

from alphagrpo_jax.rewards.verifiers.chat.base import LanguageModelError
from alphagrpo_jax.rewards.verifiers.chat.local import HFChat

WORDS = ("<pad>", "<end>", "<sys>", "<user>", "<bot>", "a", "red", "cat", "yes", "no")
TEMPLATE = (
    "{% for m in messages %}<{{ {'system': 'sys', 'user': 'user', 'assistant': 'bot'}[m.role] }}> "
    "{{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = [{"role": "system", "content": "red"}, {"role": "user", "content": "a red cat"}]
PROMPT = "<sys> red <end> <user> a red cat <end> <bot>"


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory):
    torch.manual_seed(14)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    folder = tmp_path_factory.mktemp("causal")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def greedy(folder, count):
    """The model's reply token by token, by plain forward passes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = [WORDS.index(word) for word in PROMPT.split()]
    start = len(tokens)
    with torch.inference_mode():
        while len(tokens) - start < count and (len(tokens) == start or tokens[-1] != 1):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[start:]


def test_a_reply_is_the_greedy_continuation_of_the_templated_chat(causal_folder):
    expected = greedy(causal_folder, 20)
    assert expected[-1] == 1, "the seed gives a reply that ends"
    assert len(expected) > 3, "the seed gives a reply of some words"
    chat = HFChat(causal_folder, device="cpu", dtype="auto", max_tokens=20)
    words = [WORDS[token] for token in expected[:-1] if token > 1]
    assert chat.complete(CHAT).split() == words
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(chat.complete(CHAT))) for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.split() for reply in replies] == [words] * 3


def test_a_reply_that_is_cut_is_none(causal_folder):
    chat = HFChat(causal_folder, device="cpu", dtype="auto", max_tokens=2)
    with pytest.raises(LanguageModelError, match=r"cut at 2 tokens; raise --max-tokens") as cut:
        chat.complete(CHAT)
    assert (cut.value.kind, cut.value.retryable) == ("cut", False)


def test_an_image_text_model_chats_without_images(llava_folder, tmp_path):
    """The greedy text up to its third different token, which is made the end token."""
    folder = shutil.copytree(llava_folder, tmp_path / "model")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = "<|system|>red<|user|>a red cat<|assistant|>"
    tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(tokens)
    with torch.inference_mode():
        while len(tokens) - start < 30 and len(set(tokens[start:])) < 3:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
    assert len(set(tokens[start:])) == 3, "the seed gives different tokens"
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokens[-1], "pad_token_id": 0})
    )
    chat = HFChat(folder, device="cpu", dtype="float32", max_tokens=30)
    expected = processor.tokenizer.decode(tokens[start:], skip_special_tokens=True)
    assert chat.complete(CHAT) == expected


BROKEN = {
    "no folder": (lambda folder: folder / "none", "has no config.json"),
    "no chat template": (lambda folder: without(folder, "chat_template.jinja"), "no chat template"),
    "missing tensors": (lambda folder: cut(folder, "lm_head.weight"), "lacks 1 tensors"),
    "damaged weights": (lambda folder: damage(folder), "cannot load the language model"),
}


def without(folder, name):
    (folder / name).unlink()
    return folder


def cut(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def damage(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_explained(causal_folder, tmp_path, name):
    spoil, message = BROKEN[name]
    folder = spoil(shutil.copytree(causal_folder, tmp_path / "model"))
    with pytest.raises(LanguageModelError, match=message):
        HFChat(folder, device="cpu", dtype="auto", max_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "got dtype 'float12', expected float32"),
        ({"device": "gpu"}, "cannot run on device 'gpu'"),
    ],
)
def test_a_wrong_dtype_or_device_is_explained(causal_folder, options, message):
    with pytest.raises(LanguageModelError, match=message):
        HFChat(causal_folder, **{"device": "cpu", "dtype": "auto", "max_tokens": 5} | options)


def test_a_template_that_refuses_the_chat_is_explained(causal_folder, tmp_path):
    folder = shutil.copytree(causal_folder, tmp_path / "model")
    refusal = "{{ raise_exception('no system turns') }}"
    (folder / "chat_template.jinja").write_text(refusal)
    chat = HFChat(folder, device="cpu", dtype="auto", max_tokens=5)
    with pytest.raises(LanguageModelError, match="refuses the conversation: no system turns"):
        chat.complete(CHAT)
