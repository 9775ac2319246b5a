"""One prompt -> its semantic and quality questions, by asking a language model stage by stage.

Semantic questions follow the Davidsonian scene graph (Cho et al., arXiv 2310.18235): tuples, one
question per tuple, dependencies. Every question is then checked against the prompt; a decomposition
with a question that fails the check is made again, with what was refused and why, as is AlphaGRPO's
habit (arXiv 2605.12495). If no try is free of faults, the best one is kept and its faulty questions
are marked `is_valid: false`: they stay in the record and are never asked.
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
      kind: of a `LanguageModelError`, or "useless" for replies that were given.
    """

    def __init__(self, stage: str, reason: str, *, kind: Kind | Literal["useless"]) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason, self.kind = stage, reason, kind


@dataclasses.dataclass(frozen=True)
class Judged:
    """A question, and what is wrong with it (None: nothing)."""

    question: Question
    fault: str | None


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """The questions of a prompt; those with a fault have `is_valid` False."""

    semantic: tuple[Judged, ...]
    quality: tuple[Judged, ...]
    tries: dict[str, int]  # "semantic", "quality": whole attempts
    repairs: dict[str, int]  # by stage: replies of the wrong form that were asked for again
    calls: int  # of the language model


class Dialogue:
    """Asks for stages, mends replies of the wrong form by asking again, and counts."""

    def __init__(self, model: LanguageModel, *, repairs: int = REPAIRS) -> None:
        self._model, self._repairs = model, repairs
        self.repairs: collections.Counter[str] = collections.Counter()
        self.calls = 0

    def ask(
        self,
        stage: texts.Stage,
        data: Mapping[str, Any],
        check: Callable[[Any], None] = lambda _: None,
    ) -> Any:
        """The reply to a stage, an instance of its form that `check` accepts.

        Args:
          stage: what to ask.
          data: what about; passed as data, never as instruction.
          check: raises ReplyError for what the form cannot say.
        Raises:
          DecompositionError: no reply, or none of the right form after the repairs.
        """
        opening = texts.messages(stage, data)
        chat = opening
        for number in range(self._repairs + 1):
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
                chat = [*opening, *texts.refusal(reply, problem)]
                self.repairs[stage.name] += number < self._repairs
            else:
                return value
        raise DecompositionError(
            stage.name,
            f"no usable reply in {self._repairs + 1} requests; the last: {problem}",
            kind="useless",
        )


def decompose(
    prompt: str, model: LanguageModel, *, tries: int = TRIES, repairs: int = REPAIRS
) -> Decomposition:
    """Decomposes one prompt.

    Args:
      prompt: of the image.
      model: asked about seven times if nothing has to be repeated.
      tries: whole attempts at the semantic questions, and at the quality questions.
      repairs: see `Dialogue`.
    Raises:
      DecompositionError: no reply, no usable reply, or no valid question of a kind in any try.
    """
    dialogue = Dialogue(model, repairs=repairs)
    semantic, semantic_tries = _best(
        lambda rejected: _semantic(prompt, dialogue, rejected), tries, "validation"
    )
    semantic = _tagged(prompt, semantic, dialogue)
    quality, quality_tries = _best(
        lambda rejected: _quality(prompt, semantic, dialogue, rejected), tries, "quality_validation"
    )
    return Decomposition(
        semantic=semantic,
        quality=quality,
        tries={"semantic": semantic_tries, "quality": quality_tries},
        repairs=dict(dialogue.repairs),
        calls=dialogue.calls,
    )


Rejected = Sequence[Judged]


def _best(
    attempt: Callable[[Rejected], tuple[Judged, ...]], tries: int, stage: str
) -> tuple[tuple[Judged, ...], int]:
    """The first attempt without faults, or after all tries the one with the largest valid share."""
    best: tuple[Judged, ...] = ()
    rejected: Rejected = ()
    failure: DecompositionError | None = None
    for number in range(1, tries + 1):
        try:
            found = attempt(rejected)
        except DecompositionError as error:
            if error.kind != "useless":
                raise
            failure = error
            continue
        if _valid_share(found) > _valid_share(best):
            best = found
        rejected = [each for each in found if each.fault is not None]
        if not rejected:
            return found, number
    if best:
        return best, tries
    if failure is not None and not rejected:
        raise failure
    shown = "; ".join(f"{each.question.text!r}: {each.fault}" for each in rejected[:3])
    reason = f"no valid question in {tries} tries; the last: {shown}"
    raise DecompositionError(stage, reason, kind="useless")


def _valid_share(found: Sequence[Judged]) -> float:
    return sum(each.fault is None for each in found) / max(len(found), 1)


def _semantic(prompt: str, dialogue: Dialogue, rejected: Rejected) -> tuple[Judged, ...]:
    """Tuples, questions, dependencies and verdicts: one whole try, without tags."""
    data: dict[str, Any] = {"prompt": prompt}
    tuples = dialogue.ask(texts.TUPLES, data | _feedback(rejected), _check_tuples).tuples
    ids = [each.id for each in tuples]
    data["tuples"] = [
        {"id": t.id, "tuple": texts.tuple_text(t.category, t.detail, t.arguments)} for t in tuples
    ]

    def check_questions(reply: schemas.Questions) -> None:
        _check_ids(ids, reply.questions)
        _check_wording(prompt, [each.question for each in reply.questions])

    found = dialogue.ask(texts.QUESTIONS, data, check_questions).questions
    asked = {each.id: each.question for each in found}
    data["questions"] = [{"id": number, "question": asked[number]} for number in ids]
    graph = dialogue.ask(
        texts.DEPENDENCIES, data, lambda reply: _check_graph(ids, reply.dependencies)
    ).dependencies
    parents = {each.id: each.parents for each in graph}
    faults = _verdicts(texts.VALIDATION, prompt, [asked[i] for i in ids], dialogue, SEMANTIC_FAULTS)
    place = {number: index for index, number in enumerate(ids)}
    return tuple(
        Judged(
            Question(
                text=asked[number],
                tag="",
                is_valid=fault is None,
                dependency=tuple(sorted({place[parent] for parent in parents[number]})),
            ),
            fault,
        )
        for number, fault in zip(ids, faults, strict=True)
    )


def _tagged(prompt: str, semantic: Sequence[Judged], dialogue: Dialogue) -> tuple[Judged, ...]:
    numbered = [
        {"id": number, "question": each.question.text}
        for number, each in enumerate(semantic, start=1)
    ]
    ids = [each["id"] for each in numbered]
    data = {"prompt": prompt, "questions": numbered}
    reply = dialogue.ask(texts.TAGS, data, lambda reply: _check_ids(ids, reply.tags))
    tags = {each.id: each.tag for each in reply.tags}
    return tuple(
        dataclasses.replace(each, question=dataclasses.replace(each.question, tag=tags[number]))
        for number, each in zip(ids, semantic, strict=True)
    )


def _quality(
    prompt: str, semantic: Sequence[Judged], dialogue: Dialogue, rejected: Rejected
) -> tuple[Judged, ...]:
    """Quality questions and their verdicts: one whole try."""
    content = [each.question.text for each in semantic if each.fault is None]
    data = {"prompt": prompt, "content_questions": content} | _feedback(rejected)
    taken = [each.question.text for each in semantic]  # the record keeps faulty ones too

    def check(reply: schemas.QualityQuestions) -> None:
        _check_wording(prompt, [each.question for each in reply.questions], taken=taken)

    found = dialogue.ask(texts.QUALITY, data, check).questions
    faults = _verdicts(
        texts.QUALITY_VALIDATION,
        prompt,
        [each.question for each in found],
        dialogue,
        QUALITY_FAULTS,
    )
    return tuple(
        Judged(Question(text=each.question, tag=each.tag, is_valid=fault is None), fault)
        for each, fault in zip(found, faults, strict=True)
    )


def _verdicts(
    stage: texts.Stage,
    prompt: str,
    questions: Sequence[str],
    dialogue: Dialogue,
    faults: Mapping[str, str],
) -> list[str | None]:
    """What the check finds wrong with each question, None where nothing."""
    numbered = [{"id": n, "question": text} for n, text in enumerate(questions, start=1)]
    ids = [each["id"] for each in numbered]
    data = {"prompt": prompt, "questions": numbered}
    reply = dialogue.ask(stage, data, lambda reply: _check_ids(ids, reply.verdicts))
    verdicts = {each.id: each.model_dump() for each in reply.verdicts}
    result: list[str | None] = []
    for number in ids:
        wrong = [words for name, words in faults.items() if not verdicts[number][name]]
        reason = f"{', '.join(wrong)} ({verdicts[number]['reason']})"
        result.append(reason if wrong else None)
    return result


def _feedback(rejected: Rejected) -> dict[str, Any]:
    """What an earlier try got wrong, as data for the next one."""
    if not rejected:
        return {}
    return {"rejected": [{"question": r.question.text, "reason": r.fault} for r in rejected]}


def _check_tuples(reply: schemas.Tuples) -> None:
    ids = [each.id for each in reply.tuples]
    if len(set(ids)) != len(ids):
        raise schemas.ReplyError(f"tuples: got the ids {ids}, expected every id once")
    facts = [phrasing.same(f"{t.category} {' '.join(t.arguments)}") for t in reply.tuples]
    for place, fact in enumerate(facts):
        if fact in facts[:place]:
            raise schemas.ReplyError(f"tuple {ids[place]} repeats tuple {ids[facts.index(fact)]}")


def _check_ids(expected: Sequence[int], items: Sequence[Any]) -> None:
    ids = [each.id for each in items]
    if sorted(ids) != sorted(expected):
        raise schemas.ReplyError(f"got the ids {ids}, expected each of {list(expected)} once")


def _check_wording(prompt: str, questions: Sequence[str], *, taken: Sequence[str] = ()) -> None:
    seen = {phrasing.same(text) for text in taken}
    for text in questions:
        if not text.endswith("?"):
            raise schemas.ReplyError(f"{text!r} does not end with a question mark")
        wrong = phrasing.negative(text, prompt)
        if wrong:
            raise schemas.ReplyError(f"question {text!r} {wrong}")
        if phrasing.same(text) in seen:
            raise schemas.ReplyError(f"question {text!r} is asked twice")
        seen.add(phrasing.same(text))


def _check_graph(ids: Sequence[int], items: Sequence[schemas.Parents]) -> None:
    _check_ids(ids, items)
    parents = {each.id: each.parents for each in items}
    for number, needs in parents.items():
        unknown = sorted(set(needs) - set(ids))
        if unknown:
            raise schemas.ReplyError(f"id {number}: got parents {unknown}, which are no ids")
    circle = find_cycle(parents)
    if circle:
        raise schemas.ReplyError(f"dependencies form a circle through the ids {circle}")


def find_cycle(parents: Mapping[int, Sequence[int]]) -> list[int]:
    """The nodes that lie on circles of a graph or wait for one; empty if it has none.

    Args:
      parents: node -> its parents, all of them nodes.
    """
    left = dict(parents)
    while True:
        free = [node for node, needs in left.items() if not any(need in left for need in needs)]
        if not free:
            return sorted(left)
        for node in free:
            del left[node]
