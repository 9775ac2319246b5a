"""Rewards for texts: their form, and answers that are right or wrong."""

from collections.abc import Sequence

from alphagrpo_jax.rewards.verifiers.chat.control_tokens import quoted

# The first words of a concrete wish in the shapes world's reflections.
WISHES = ("make", "turn", "remove", "move", "add", "change", "keep")


def format_reward(text: str) -> float:
    """1.0 if the text, without outer white space, is `<think> ... </think>`, else 0.0."""
    stripped = text.strip()
    return float(stripped.startswith("<think>") and stripped.endswith("</think>"))


def reflection_rule(text: str) -> float:
    """1.0 if a reflection of the shapes world says what is wrong and how to mend it, else 0.0.

    A rule for `<think> remark. wish. layout </think>`, the form that the small model was pretrained
    on; for other models the verifier is asked (`REFLECTION_QUESTIONS`).
    """
    if not format_reward(text):
        return 0.0
    inside = text.strip().removeprefix("<think>").removesuffix("</think>")
    sentences = [sentence.strip() for sentence in inside.split(". ")]
    wishes = [sentence.split(" ")[0] in WISHES for sentence in sentences]
    if len(sentences) < 3 or not any(wishes):
        return 0.0
    return float(wishes.index(True) >= 1)  # something was said before the first wish


# What a verifier is asked about a reflection, beside the image that it speaks of. The policy in
# training wrote it, so it stands there as a JSON string that it cannot end: whatever would sway the
# verifier from outside the quotes would be learnt.
REFLECTION_QUESTIONS = (
    "A user asked for this picture: {prompt}. A reviewer wrote: {text}. Does the reviewer's "
    "text stay with the user's request, without asking for anything else?",
    "A user asked for this picture: {prompt}. A reviewer wrote: {text}. Does the reviewer name "
    "what is wrong in this picture?",
    "A user asked for this picture: {prompt}. A reviewer wrote: {text}. Does the reviewer end "
    "with concrete instructions for changing this picture?",
)


def reflection_questions(prompt: str, text: str) -> list[str]:
    """`REFLECTION_QUESTIONS` about one reflection, both texts quoted (see `control.quoted`)."""
    texts = {"prompt": quoted(prompt), "text": quoted(text)}
    return [question.format(**texts) for question in REFLECTION_QUESTIONS]


def answer_reward(text: str, answers: Sequence[str]) -> float:
    """1.0 if the text is a right answer, letter case, outer blanks and a full stop aside."""
    return float(_bare(text) in {_bare(answer) for answer in answers})


def _bare(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
