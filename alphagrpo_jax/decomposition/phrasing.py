"""Rules for the wording of a question, whose good answer must be yes; the tags of questions.

"Positive only" means that yes is the good answer: "Is the image free of cars?" is fine where a
prompt wants no cars; "Are there any mistakes?" is not, nor is "Is there no car?", whose yes and no
are read both ways.
"""

import re

SEMANTIC_TAGS = (
    "Style",
    "Environment",
    "Viewpoint",
    "Existence",
    "Count",
    "Attribute",
    "Action",
    "Spatial",
    "Text",
    "Negative",
)
QUALITY_TAGS = (
    "Geometry",
    "Anatomy",
    "Texture",
    "Coherence",
    "Lighting",
    "Physics",
    "Legibility",
    "Aesthetics",
)
TAGS = {"semantic": SEMANTIC_TAGS, "quality": QUALITY_TAGS}

_APOSTROPHE = "['\u2019]"
_VERBS = "is|are|was|were|do|does|did|has|have|had|can|could|will|would|should"
_CONTRACTED = re.compile(rf"(?:{_VERBS}|ca|wo)n{_APOSTROPHE}?t\b", re.IGNORECASE)
_NEGATED = re.compile(
    rf"(?:{_VERBS})\s+(?:(?:there|it|they|we|you|the image|the picture)\s+)?"
    r"(?:not|no|never|nothing|none|nobody|neither)\b",
    re.IGNORECASE,
)
_FAULTS = (
    r"mistakes?|errors?|artifacts?|artefacts?|defects?|distortions?|glitch(?:es)?|flaws?|"
    r"blemish(?:es)?|deformit(?:y|ies)|inconsistenc(?:y|ies)|imperfections?|problems?|issues?|"
    r"anomal(?:y|ies)|malformations?"
)
_ASKS_FOR_FAULTS = re.compile(
    rf"(?:(?:{_VERBS})\s+there|(?:{_VERBS})\b.*\b(?:have|has|contain|contains|show|shows|see))\s+"
    rf"(?:(?:any|a|an|some|many|visible|obvious)\s+)*(?:\w+\s+)?({_FAULTS})\b",
    re.IGNORECASE,
)
_FAULTY = re.compile(
    rf"(?:{_VERBS})\b.*\b(distorted|deformed|malformed|disfigured|blurry|blurred|garbled|illegible|"
    r"unnatural|implausible|incorrect|wrong|missing|incoherent|inconsistent)\?$",
    re.IGNORECASE,
)


def negation_fault(question: str, prompt: str) -> str | None:
    """Returns why no would be the good answer of a question, or None if yes is.

    Args:
      question: its text.
      prompt: what it belongs to; faults that the prompt itself asks for may be asked about.
    """
    question = question.strip()
    if _CONTRACTED.match(question) or _NEGATED.match(question):
        return "is negated; ask so that yes is the good answer, e.g. 'Is the image free of ...?'"
    match = _ASKS_FOR_FAULTS.match(question)
    if match and not _mentions(prompt, match[1]):
        return f"asks for {match[1]!r}, so that no is the good answer; ask 'Is ... free of ...?'"
    return None


def wording_doubt(question: str, prompt: str) -> str | None:
    """Returns a suspicion about a question's wording, or None."""
    question = question.strip()
    if not question.endswith("?"):
        return "does not end with a question mark"
    match = _FAULTY.match(question)
    if match and not _mentions(prompt, match[1]):
        return f"seems to ask for a fault ({match[1]!r}); yes must be the good answer"
    if re.search(rf"\bnot\b|n{_APOSTROPHE}t\b", question, re.IGNORECASE):
        return "has a negation inside; yes must be the good answer"
    return None


def normalize_text(text: str) -> str:
    """Folds a text's case and blanks and cuts the mark at its end, to compare it with others."""
    return " ".join(text.casefold().split()).rstrip(" .?!")


def _mentions(prompt: str, fault: str) -> bool:
    """Tells if the prompt has the word, in any number: the first letters decide."""
    return fault.casefold()[: max(4, len(fault) - 3)] in prompt.casefold()
