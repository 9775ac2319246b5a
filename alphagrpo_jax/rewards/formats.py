"""Rewards of texts: format, reflections, and answers by rule."""

from collections.abc import Sequence

from alphagrpo_jax.rewards.verifiers.chat.control_tokens import quoted

# First words of a concrete edit instruction in the shapes world's reflections.
WISHES = ("make", "turn", "remove", "move", "add", "change", "keep")


def format_reward(text: str) -> float:
    """Returns 1.0 if the text is `<think> ... </think>`, outer white space aside, else 0.0."""
    stripped = text.strip()
    return float(stripped.startswith("<think>") and stripped.endswith("</think>"))


def reflection_rule(text: str) -> float:
    """Returns 1.0 if a shapes-world reflection names a fault and then how to mend it, else 0.0.

    The rule fits `<think> remark. wish. layout </think>`, the form that the small model was
    pretrained on. For other models the verifier is asked (`REFLECTION_QUESTIONS`).
    """
    if not format_reward(text):
        return 0.0
    inside = text.strip().removeprefix("<think>").removesuffix("</think>")
    sentences = [sentence.strip() for sentence in inside.split(". ")]
    wishes = [sentence.split(" ")[0] in WISHES for sentence in sentences]
    if len(sentences) < 3 or not any(wishes):
        return 0.0
    return float(wishes.index(True) >= 1)  # a remark comes before the first wish


# Questions about a reflection, asked together with the image that it describes. The policy in
# training wrote the text, so it stands here as a JSON string that it cannot end: whatever swayed
# the verifier from outside the quotes would be learnt.
REFLECTION_QUESTIONS = (
    "A user asked for this picture: {prompt}. A reviewer wrote: {text}. Does the reviewer's "
    "text stay with the user's request, without asking for anything else?",
    "A user asked for this picture: {prompt}. A reviewer wrote: {text}. Does the reviewer name "
    "what is wrong in this picture?",
    "A user asked for this picture: {prompt}. A reviewer wrote: {text}. Does the reviewer end "
    "with concrete instructions for changing this picture?",
)


def reflection_questions(prompt: str, text: str) -> list[str]:
    """Fills in `REFLECTION_QUESTIONS`, both texts quoted (`chat.control_tokens.quoted`)."""
    texts = {"prompt": quoted(prompt), "text": quoted(text)}
    return [question.format(**texts) for question in REFLECTION_QUESTIONS]


def answer_reward(text: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the text is a right answer, else 0.0.

    Letter case, outer white space and full stops at the end do not count.
    """
    return float(_normalized(text) in {_normalized(answer) for answer in answers})


def _normalized(text: str) -> str:
    """Lower-cases a text and strips white space and final full stops."""
    return text.strip().rstrip(".").strip().lower()
