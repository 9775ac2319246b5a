"""A judge that thinks is read at the token behind the end of its thinking, as forced here."""

import judge_families
import numpy as np
import pytest
import torch
from judge_families import FAMILIES, QUESTIONS, conversation, picture, plain_p_yes

from alphagrpo_jax.rewards.verifiers import hf, passes
from alphagrpo_jax.rewards.verifiers.answer_finder import opened_by
from alphagrpo_jax.rewards.verifiers.chat.replies import NoAnswerError, ReplyText
from alphagrpo_jax.rewards.verifiers.chat.thinking import answer_position
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS
from alphagrpo_jax.rewards.verifiers.thinking import Reply

pytestmark = pytest.mark.torch

LOGITS = torch.arange(5.0)


def reply_of(prompt: str, *texts: str) -> Reply:
    """A reply whose tokens are the texts; its logits count the tokens before."""
    reply = Reply(prompt, lambda tokens: "".join(texts[token] for token in tokens))
    for token in range(len(texts)):
        reply.expect(LOGITS + token)
        reply.append(token)
    return reply


@pytest.mark.parametrize(
    ("prompt", "texts", "index"),
    [
        ("assistant:", ["Yes"], 0),
        ("assistant:", ["\n", " ", "Yes"], 2),  # blank tokens are passed over
        ("assistant:", ["<think>", "hm", "</think>", "Yes"], 3),
        ("assistant:", ["\n", "<think>", "hm", "</think>", "\n\n", "Yes"], 5),
        ("assistant:", ["<", "think", ">", "Yes", "</", "think", ">\n", "No"], 7),  # spelled out
        ("assistant:", ["<think>", "Yes", "No", "</think>", "No", "."], 4),
        ("assistant:<think>\n", ["hm", "</think>", "\n", "No"], 3),  # opened by the template
        ("assistant:<think>\n\n</think>\n\n", ["No"], 0),  # opened and closed by it
        ("e.g. <think>a</think> b\nassistant:", ["No"], 0),  # an example in the system turn
        ("[/INST]", ["[THINK]", "hm", "[/THINK]", "No"], 3),
        ("", ["<|START_THINKING|>", "a", "<|END_THINKING|>", "No"], 3),
        ("", ["◁think▷", "a", "◁/think▷", "No"], 3),
        ("", ["<", "b", ">"], 0),  # no thinking after all: the first token was the answer
        ("", ["Yes", "<think>", "</think>", "No"], 3),
        ("", ["<think>", "</think>", "<think>", "</think>", "No"], 4),
        ("", ["<think>", "</think>", "No", "</think>", "Yes", "."], 4),  # the last end counts
    ],
)
def test_the_answer_is_the_first_token_behind_the_thinking(prompt, texts, index):
    reply = reply_of(prompt, *texts)
    reading = reply.reading(100)
    assert reading.failure is None
    assert torch.equal(reading.logits, LOGITS + index)
    assert reading.tokens == tuple(range(index))
    # Over an endpoint the same tokens are read at the same place, unless the prompt alone tells.
    if not opened_by(prompt):
        assert answer_position(ReplyText(texts, "", "", "stop")) == index


@pytest.mark.parametrize(
    ("prompt", "texts", "reason"),
    [
        ("", ["<think>", "hm", "hm"], "no '</think>' in 3 tokens (cut off"),
        ("<think>", ["hm", "hm", "Yes"], "no '</think>' in 3 tokens (cut off"),
        ("", ["[THINK]", "</think>", "Yes"], "no '[/THINK]' in 3 tokens"),
        ("", ["<think>", "a</think>Yes", "."], "no answer behind the thinking"),
        ("", ["<think>", "</think>", "Yes", "<think>"], "no '</think>' in 4 tokens"),
    ],
)
def test_a_reply_without_an_answer_says_why(prompt, texts, reason):
    reading = reply_of(prompt, *texts).reading(3)
    assert reading.logits is None
    assert reason in reading.failure
    assert not reading.permanent
    with pytest.raises(NoAnswerError):
        answer_position(ReplyText(texts, "", "", "length"))


@pytest.mark.parametrize(("begin", "end"), THINKING_TAGS)
def test_tags_may_be_spelled_letter_by_letter(begin, end):
    texts = [*begin, *"Yes or no", *end, "No"]
    assert reply_of("", *texts).reading(100).tokens == tuple(range(len(texts) - 1))
    assert answer_position(ReplyText(texts, "", "", "stop")) == len(texts) - 1


def test_thinking_that_the_judge_itself_ends_is_told_apart():
    assert "ended by the judge" in reply_of("<think>", "hm", "<eos>").reading(100).failure


class Script:
    """Makes a model reply with these tokens, one list a row, then with any but blanks and tags."""

    def __init__(self, judge, rows):
        self.rows, self.step = rows, 0
        tokenizer = judge.processor.tokenizer
        texts = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
        self.barred = [i for i, text in enumerate(texts) if not text or text[0] in "<["]
        self.handle = judge.model.get_output_embeddings().register_forward_hook(self)

    def __call__(self, _module, _inputs, logits):
        logits = logits.clone()
        for row, tokens in zip(logits, self.rows, strict=True):
            if self.step < len(tokens):
                row[-1, tokens[self.step]] = 200.0
            else:
                row[-1, self.barred] = -60.0
        self.step += 1
        return logits


def plain_after(judge, question: str, reply: list[int], *, system: bool = True) -> float:
    """P(yes) behind a prompt and the beginning of a reply, by one plain forward pass."""
    inputs = judge.processor.apply_chat_template(
        conversation(picture(), question, AUDIT_INSTRUCTION, system=system),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name, value in list(inputs.items()):
        if value.shape[:2] == inputs["input_ids"].shape and name != "input_ids":
            last = value[:, -1:].expand(-1, len(reply), *value.shape[2:])
            inputs[name] = torch.cat([value, last], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], 1)
    with torch.inference_mode():
        return plain_p_yes(judge.model(**inputs).logits[0, -1].float(), judge.processor.tokenizer)


@pytest.fixture
def thinker(monkeypatch):
    """thinker(family, **options): a verifier that reads after the thinking, and its judge."""

    def build(name, **options):
        judge = FAMILIES[name]()
        monkeypatch.setattr(hf, "load", lambda *_: judge)
        options = {"min_mass": 0.0, "read": "after_thinking", "max_tokens": 80, **options}
        return HFVerifier(name, num_threads=1, **options), judge

    return build


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("qwen3_vl", "<think>", "</think>"),
        ("qwen3_vl_moe", "<think>", "</think>"),
        ("qwen3_5", "<think>", "</think>"),
        ("glm4v", "<think>", "</think>"),
        ("mistral3", "[THINK]", "[/THINK]"),
        ("gemma3", "<think>", "</think>"),  # its tokenizer has no such tokens
        ("mllama", "", ""),  # answers directly
    ],
)
def test_p_yes_behind_the_thinking_is_that_of_plain_transformers(thinker, name, begin, end):
    verifier, judge = thinker(name)

    def encode(text: str) -> list[int]:
        return judge.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    thoughts = ("is there a red circle", "wait", "the answer is no, or is it yes")
    blank = encode("\n") if begin else []
    replies = [
        [*encode(begin), *encode(thought), *encode(end), *blank] if begin else []
        for thought in thoughts
    ]
    script = Script(judge, replies)
    answers = verifier.answer(picture(), QUESTIONS[:3])
    script.handle.remove()
    expected = [
        plain_after(judge, question, reply, system=name != "mllama")
        if reply
        else verifier_first(judge, question)
        for question, reply in zip(QUESTIONS[:3], replies, strict=True)
    ]
    np.testing.assert_allclose([answer.p_yes for answer in answers], expected, atol=1e-5, rtol=0)
    assert all(0 < answer.mass < 1 for answer in answers)


def verifier_first(judge, question: str) -> float:
    logits = judge_families.plain_logits(
        judge, picture(), question, AUDIT_INSTRUCTION, system=False
    )
    return plain_p_yes(logits, judge.processor.tokenizer)


def test_thinking_that_does_not_end_is_a_failure_and_others_are_answered(thinker):
    verifier, judge = thinker("qwen3_vl", max_tokens=12)
    begin, end, word = judge_families.ids(judge.processor.tokenizer, "<think>", "</think>", "a")
    rows = [[begin, word, end], [begin, *[word] * 30], [begin, word, word, end]]
    script = Script(judge, rows)
    first, endless, last = verifier.answer(picture(), QUESTIONS[:3])
    script.handle.remove()
    assert first.p_yes is not None
    assert last.p_yes == pytest.approx(plain_after(judge, QUESTIONS[2], rows[2]), abs=1e-5)
    assert endless.p_yes is None
    assert "the thinking did not end: no '</think>' in 12 tokens" in endless.failure
    assert "verifier.max_tokens" in endless.failure


@pytest.mark.parametrize("together", [True, False])
def test_a_question_beyond_the_context_fails_alone(thinker, monkeypatch, together):
    verifier, judge = thinker("qwen3_vl", max_tokens=4)
    verifier._thinking._together = together
    longest = len(judge.processor.tokenizer(QUESTIONS[2])["input_ids"])
    prompter = verifier.passes.prompter
    prompt = prompter.prompt(QUESTIONS[0], AUDIT_INSTRUCTION)
    size = prompter.inputs(picture(), [prompt])["input_ids"].shape[1]
    monkeypatch.setattr(verifier.passes, "context_tokens", size + longest + 10)
    questions = [QUESTIONS[0], " ".join(QUESTIONS[2:3] * 4), QUESTIONS[1]]
    first, too_long, last = verifier.answer(picture(), questions)
    assert first.p_yes is not None
    assert last.p_yes is not None
    assert too_long.permanent
    assert "the judge's context holds" in too_long.failure


def test_a_reply_may_fill_the_context_that_its_own_prompt_leaves(thinker, monkeypatch):
    verifier, judge = thinker("qwen3_vl", max_tokens=40)
    prompter = verifier.passes.prompter
    short, long = QUESTIONS[1], QUESTIONS[2]
    sizes = [
        prompter.inputs(picture(), [prompter.prompt(text, AUDIT_INSTRUCTION)])["input_ids"].shape[1]
        for text in (short, long)
    ]
    monkeypatch.setattr(verifier.passes, "context_tokens", sizes[1] + 5)
    begin, word = judge_families.ids(judge.processor.tokenizer, "<think>", "a")
    failures = {}
    for questions in ([short], [long], [short, long]):
        original = verifier._thinking._read

        def scripted(image, prompts, room, original=original):
            script = Script(judge, [[begin, *[word] * 60]] * len(prompts))
            try:
                return original(image, prompts, room)
            finally:
                script.handle.remove()

        with monkeypatch.context() as patch:
            patch.setattr(verifier._thinking, "_read", scripted)
            answers = verifier.answer(picture(), questions)
        for question, answer in zip(questions, answers, strict=True):
            assert failures.setdefault(question, answer.failure) == answer.failure
    room = min(40, 5 + sizes[1] - sizes[0])
    assert f"no '</think>' in {room} tokens" in failures[short]
    assert "no '</think>' in 5 tokens" in failures[long]
    assert "the prompt leaves 5 of the judge's context" in failures[long]


def test_too_little_mass_behind_the_thinking_is_a_failure(thinker):
    verifier, judge = thinker("qwen3_vl", min_mass=0.9)
    begin, end = judge_families.ids(judge.processor.tokenizer, "<think>", "</think>")
    script = Script(judge, [[begin, end]])
    (answer,) = verifier.answer(picture(), QUESTIONS[:1])
    script.handle.remove()
    assert answer.p_yes is None
    assert answer.mass < 0.9
    assert "expected at least 0.9" in answer.failure


def test_a_thinking_judge_read_at_its_first_token_says_what_to_do(thinker):
    verifier, judge = thinker("qwen3_vl", read="first", min_mass=0.2)
    (begin,) = judge_families.ids(judge.processor.tokenizer, "<think>")
    script = Script(judge, [[begin] * 50])
    verifier.passes.way = "single"
    (answer,) = verifier.answer(picture(), QUESTIONS[:1])
    script.handle.remove()
    assert answer.p_yes is None
    assert "verifier.read='after_thinking'" in answer.failure


def test_refused_questions_of_a_thinking_judge(thinker):
    verifier, judge = thinker("qwen3_vl")
    questions = [QUESTIONS[0], "Is </think> there?", QUESTIONS[1]]
    script = Script(judge, [[], []])
    answers = verifier.answer(picture(), questions)
    script.handle.remove()
    assert [answer.permanent for answer in answers] == [False, True, False]
    assert answers[0].p_yes is not None
    assert "</think>" in answers[1].failure


def test_replies_are_generated_one_by_one_where_padding_counts(thinker, monkeypatch, caplog):
    original = passes.Prompter.inputs

    def careless(self, image, prompts, side="right"):
        inputs = original(self, image, prompts, side)
        if len(prompts) > 1 and side == "left":
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return inputs

    monkeypatch.setattr(passes.Prompter, "inputs", careless)
    verifier, judge = thinker("idefics3")
    assert "replies are generated one by one" in caplog.text
    answers = verifier.answer(picture(), QUESTIONS[:2])
    for answer, question in zip(answers, QUESTIONS, strict=False):
        logits = judge_families.plain_logits(judge, picture(), question, AUDIT_INSTRUCTION)
        first = logits.argmax()
        text = judge.processor.tokenizer.decode([int(first)])
        if text.strip() and not "<think>".startswith(text.strip()):
            expected = plain_p_yes(logits, judge.processor.tokenizer)
            assert answer.p_yes == pytest.approx(expected, abs=1e-5)


def test_ratings_of_a_thinking_judge(thinker):
    """0 to 10 behind the thinking; 10 as two tokens by what follows the 1."""
    verifier, judge = thinker("qwen3_vl")
    tokenizer = judge.processor.tokenizer
    begin, end, zero, one = judge_families.ids(tokenizer, "<think>", "</think>", "0", "1")
    verifier.ratings[10] = []
    shares = {1: 0.8, 7: 0.2}

    def forced(_module, _inputs, logits):
        logits = torch.full_like(logits, -60.0)
        step = forced.step
        if step < 2:
            logits[..., (begin, end)[step]] = 0.0
        elif step == 2:  # the answer
            for number, share in shares.items():
                logits[..., verifier.ratings[number][0]] = float(np.log(share))
        else:  # what follows the 1: a 0 with half of the mass, else the end
            logits[..., zero], logits[..., tokenizer.eos_token_id] = np.log(0.5), np.log(0.5)
        forced.step += 1
        return logits

    forced.step = 0
    handle = judge.model.get_output_embeddings().register_forward_hook(forced)
    (rating,) = verifier.rate(picture(), QUESTIONS[:1])
    handle.remove()
    assert one in verifier.ratings[1]
    assert rating.value == pytest.approx(0.4 * 1 + 0.4 * 10 + 0.2 * 7, abs=1e-3)
