"""Decomposes a prompt into semantic and quality questions: asks a language model in stages.

Semantic questions follow the Davidsonian scene graph (Cho et al., arXiv 2310.18235): tuples, one
question per tuple, dependencies. Every question is then checked against the prompt. As in AlphaGRPO
(arXiv 2605.12495), a decomposition with a question that fails the check is made again, and the
model is told the rejected questions and why. If no attempt is free of faults, the best one counts
and its faulty questions are marked `is_valid: false`: they stay in the record, never asked.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from alphagrpo_jax.decomposition import phrasing, schemas, texts
from alphagrpo_jax.rewards.verifiers.chat.base import Kind, LanguageModel, LanguageModelError
from alphagrpo_jax.runtime.records import Question

TRIES = 5  # whole decompositions of a prompt
REPAIRS = 2  # times that a reply of the wrong form is asked for again
SEMANTIC_FAULTS = {
    "necessary": "not necessary",
    "unambiguous": "ambiguous",
    "requested": "not asked for by the prompt",
    "positive": "yes is not the good answer",
}
QUALITY_FAULTS = {
    "one_aspect": "more than one aspect",
    "adds_nothing": "asks for what the prompt does not say",
    "positive": "yes is not the good answer",
}


class DecompositionError(Exception):
    """A prompt could not be decomposed.

    Attributes:
      stage: name of the stage that failed.
      reason: why.
      kind: of a `LanguageModelError`, or "useless" for replies that cannot be used.
    """

    def __init__(self, stage: str, reason: str, *, kind: Kind | Literal["useless"]) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason, self.kind = stage, reason, kind


@dataclasses.dataclass(frozen=True)
class CheckedQuestion:
    """A question, and the fault that the check found in it (None: none)."""

    question: Question
    fault: str | None


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """The questions of a prompt; those with a fault have `is_valid` False."""

    semantic: tuple[CheckedQuestion, ...]
    quality: tuple[CheckedQuestion, ...]
    tries: dict[str, int]  # "semantic", "quality": whole attempts
    repairs: dict[str, int]  # by stage: replies of the wrong form that were asked for again
    calls: int  # of the language model


class StageDialogue:
    """Asks a language model stage by stage, asks again after replies of the wrong form, and counts.

    Attributes:
      repairs: by stage, replies that were asked for again.
      calls: of the language model.
    """

    def __init__(self, model: LanguageModel, *, repairs: int = REPAIRS) -> None:
        self._model, self._max_repairs = model, repairs
        self.repairs: collections.Counter[str] = collections.Counter()
        self.calls = 0

    def ask(
        self,
        stage: texts.Stage,
        data: Mapping[str, Any],
        check: Callable[[Any], None] = lambda _: None,
    ) -> Any:
        """Asks for the reply to a stage, an instance of the stage's form that `check` accepts.

        Args:
          stage: the question to the model.
          data: what the stage works on; passed as data, never as instruction.
          check: raises ReplyError for faults that the form cannot express.
        Raises:
          DecompositionError: no reply, or none of the right form after the repairs.
        """
        opening = texts.messages(stage, data)
        chat = opening
        for number in range(self._max_repairs + 1):
            self.calls += 1
            try:
                reply = self._model.complete(chat, stage.form)
            except LanguageModelError as error:
                raise DecompositionError(stage.name, str(error), kind=error.kind) from error
            try:
                value = schemas.parse(reply, stage.form)
                check(value)
            except schemas.ReplyError as error:
                problem = str(error)
                # From the opening again: the model sees its last refused reply only.
                chat = [*opening, *texts.retry_messages(reply, problem)]
                self.repairs[stage.name] += number < self._max_repairs
            else:
                return value
        raise DecompositionError(
            stage.name,
            f"no usable reply in {self._max_repairs + 1} requests; the last: {problem}",
            kind="useless",
        )


def decompose(
    prompt: str, model: LanguageModel, *, tries: int = TRIES, repairs: int = REPAIRS
) -> Decomposition:
    """Decomposes one prompt into semantic and quality questions.

    Args:
      prompt: of the image.
      model: asked about seven times if nothing has to be repeated.
      tries: whole attempts at the semantic questions, and at the quality questions.
      repairs: see `StageDialogue`.
    Raises:
      DecompositionError: no reply, no usable reply, or no valid question of a kind in any try.
    """
    dialogue = StageDialogue(model, repairs=repairs)
    semantic, semantic_tries = _best_attempt(
        lambda rejected: _attempt_semantic(prompt, dialogue, rejected), tries, "validation"
    )
    semantic = _add_tags(prompt, semantic, dialogue)
    quality, quality_tries = _best_attempt(
        lambda rejected: _attempt_quality(prompt, semantic, dialogue, rejected),
        tries,
        "quality_validation",
    )
    return Decomposition(
        semantic=semantic,
        quality=quality,
        tries={"semantic": semantic_tries, "quality": quality_tries},
        repairs=dict(dialogue.repairs),
        calls=dialogue.calls,
    )


def _best_attempt(
    attempt: Callable[[Sequence[CheckedQuestion]], tuple[CheckedQuestion, ...]],
    tries: int,
    stage: str,
) -> tuple[tuple[CheckedQuestion, ...], int]:
    """Returns the first attempt without faults, else the one with the largest share of valid ones.

    Args:
      attempt: makes and checks questions; gets the questions that the attempt before was rejected
        for.
      tries: attempts, at most.
      stage: that an error is ascribed to.
    Returns:
      The questions, and the number of attempts.
    """
    best: tuple[CheckedQuestion, ...] = ()
    rejected: Sequence[CheckedQuestion] = ()
    failure: DecompositionError | None = None
    for number in range(1, tries + 1):
        try:
            questions = attempt(rejected)
        except DecompositionError as error:
            if error.kind != "useless":
                raise
            failure = error
            continue
        if _valid_share(questions) > _valid_share(best):
            best = questions
        rejected = [checked for checked in questions if checked.fault is not None]
        if not rejected:
            return questions, number
    if best:
        return best, tries
    if failure is not None and not rejected:
        raise failure
    listed = "; ".join(f"{checked.question.text!r}: {checked.fault}" for checked in rejected[:3])
    reason = f"no valid question in {tries} tries; the last: {listed}"
    raise DecompositionError(stage, reason, kind="useless")


def _valid_share(questions: Sequence[CheckedQuestion]) -> float:
    return sum(checked.fault is None for checked in questions) / max(len(questions), 1)


def _attempt_semantic(
    prompt: str, dialogue: StageDialogue, rejected: Sequence[CheckedQuestion]
) -> tuple[CheckedQuestion, ...]:
    """Asks for tuples, questions, dependencies and verdicts: one whole attempt, without tags."""
    data: dict[str, Any] = {"prompt": prompt}
    tuples = dialogue.ask(texts.TUPLES, data | _rejected_data(rejected), _check_tuples).tuples
    ids = [scene_tuple.id for scene_tuple in tuples]
    data["tuples"] = [
        {"id": t.id, "tuple": texts.tuple_text(t.category, t.detail, t.arguments)} for t in tuples
    ]

    def check_questions(reply: schemas.Questions) -> None:
        _check_ids(ids, reply.questions)
        _check_wording(prompt, [item.question for item in reply.questions])

    items = dialogue.ask(texts.QUESTIONS, data, check_questions).questions
    text_of = {item.id: item.question for item in items}
    data["questions"] = [{"id": number, "question": text_of[number]} for number in ids]
    graph = dialogue.ask(
        texts.DEPENDENCIES, data, lambda reply: _check_graph(ids, reply.dependencies)
    ).dependencies
    parents = {item.id: item.parents for item in graph}
    faults = _find_faults(
        texts.VALIDATION, prompt, [text_of[number] for number in ids], dialogue, SEMANTIC_FAULTS
    )
    index_of = {number: index for index, number in enumerate(ids)}
    return tuple(
        CheckedQuestion(
            Question(
                text=text_of[number],
                tag="",
                is_valid=fault is None,
                dependency=tuple(sorted({index_of[parent] for parent in parents[number]})),
            ),
            fault,
        )
        for number, fault in zip(ids, faults, strict=True)
    )


def _add_tags(
    prompt: str, semantic: Sequence[CheckedQuestion], dialogue: StageDialogue
) -> tuple[CheckedQuestion, ...]:
    """Asks for the tags of the semantic questions and returns the questions with them."""
    ids = range(1, len(semantic) + 1)
    numbered = [
        {"id": number, "question": checked.question.text}
        for number, checked in zip(ids, semantic, strict=True)
    ]
    data = {"prompt": prompt, "questions": numbered}
    reply = dialogue.ask(texts.TAGS, data, lambda reply: _check_ids(ids, reply.tags))
    tags = {item.id: item.tag for item in reply.tags}
    return tuple(
        dataclasses.replace(
            checked, question=dataclasses.replace(checked.question, tag=tags[number])
        )
        for number, checked in zip(ids, semantic, strict=True)
    )


def _attempt_quality(
    prompt: str,
    semantic: Sequence[CheckedQuestion],
    dialogue: StageDialogue,
    rejected: Sequence[CheckedQuestion],
) -> tuple[CheckedQuestion, ...]:
    """Asks for quality questions and their verdicts: one whole attempt."""
    content = [checked.question.text for checked in semantic if checked.fault is None]
    data = {"prompt": prompt, "content_questions": content} | _rejected_data(rejected)
    # No quality question may repeat a faulty semantic one either: the record holds both.
    semantic_texts = [checked.question.text for checked in semantic]

    def check(reply: schemas.QualityQuestions) -> None:
        _check_wording(prompt, [item.question for item in reply.questions], earlier=semantic_texts)

    items = dialogue.ask(texts.QUALITY, data, check).questions
    faults = _find_faults(
        texts.QUALITY_VALIDATION,
        prompt,
        [item.question for item in items],
        dialogue,
        QUALITY_FAULTS,
    )
    return tuple(
        CheckedQuestion(Question(text=item.question, tag=item.tag, is_valid=fault is None), fault)
        for item, fault in zip(items, faults, strict=True)
    )


def _find_faults(
    stage: texts.Stage,
    prompt: str,
    questions: Sequence[str],
    dialogue: StageDialogue,
    fault_words: Mapping[str, str],
) -> list[str | None]:
    """Asks for verdicts on questions; returns the faults of each in words, None where it has none.

    Args:
      stage: a validation.
      prompt: of the image.
      questions: texts.
      dialogue: with the language model.
      fault_words: by field of a verdict, the fault if the field is false.
    """
    numbered = [{"id": number, "question": text} for number, text in enumerate(questions, start=1)]
    ids = range(1, len(questions) + 1)
    data = {"prompt": prompt, "questions": numbered}
    reply = dialogue.ask(stage, data, lambda reply: _check_ids(ids, reply.verdicts))
    verdicts = {verdict.id: verdict.model_dump() for verdict in reply.verdicts}
    faults: list[str | None] = []
    for number in ids:
        wrong = [words for name, words in fault_words.items() if not verdicts[number][name]]
        reason = f"{', '.join(wrong)} ({verdicts[number]['reason']})"
        faults.append(reason if wrong else None)
    return faults


def _rejected_data(rejected: Sequence[CheckedQuestion]) -> dict[str, Any]:
    """Returns the rejected questions of the attempt before, as data for the next one."""
    if not rejected:
        return {}
    return {"rejected": [{"question": r.question.text, "reason": r.fault} for r in rejected]}


def _check_tuples(reply: schemas.Tuples) -> None:
    ids = [scene_tuple.id for scene_tuple in reply.tuples]
    if len(set(ids)) != len(ids):
        raise schemas.ReplyError(f"tuples: got the ids {ids}, expected every id once")
    facts = [phrasing.normalize_text(f"{t.category} {' '.join(t.arguments)}") for t in reply.tuples]
    for index, fact in enumerate(facts):
        if fact in facts[:index]:
            raise schemas.ReplyError(f"tuple {ids[index]} repeats tuple {ids[facts.index(fact)]}")


def _check_ids(expected: Sequence[int], items: Sequence[Any]) -> None:
    ids = [item.id for item in items]
    if sorted(ids) != sorted(expected):
        raise schemas.ReplyError(f"got the ids {ids}, expected each of {list(expected)} once")


def _check_wording(prompt: str, questions: Sequence[str], *, earlier: Sequence[str] = ()) -> None:
    """Checks the wording of questions, which must differ from each other and from `earlier` ones.

    Raises:
      ReplyError: what is wrong with one of them.
    """
    known_texts = {phrasing.normalize_text(text) for text in earlier}
    for text in questions:
        if not text.endswith("?"):
            raise schemas.ReplyError(f"{text!r} does not end with a question mark")
        fault = phrasing.negation_fault(text, prompt)
        if fault:
            raise schemas.ReplyError(f"question {text!r} {fault}")
        if phrasing.normalize_text(text) in known_texts:
            raise schemas.ReplyError(f"question {text!r} is asked twice")
        known_texts.add(phrasing.normalize_text(text))


def _check_graph(ids: Sequence[int], items: Sequence[schemas.Parents]) -> None:
    _check_ids(ids, items)
    parents = {item.id: item.parents for item in items}
    for number, needs in parents.items():
        unknown = sorted(set(needs) - set(ids))
        if unknown:
            raise schemas.ReplyError(f"id {number}: got parents {unknown}, which are no ids")
    circle = find_cycle(parents)
    if circle:
        raise schemas.ReplyError(f"dependencies form a circle through the ids {circle}")


def find_cycle(parents: Mapping[int, Sequence[int]]) -> list[int]:
    """Returns the nodes of a graph that lie on circles or depend on one; empty if it has none.

    Args:
      parents: node -> its parents, all of them nodes.
    """
    remaining = dict(parents)
    while True:
        free = [n for n, needs in remaining.items() if not any(need in remaining for need in needs)]
        if not free:
            return sorted(remaining)
        for node in free:
            del remaining[node]
