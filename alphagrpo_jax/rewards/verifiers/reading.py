"""Reads answers and ratings from the log-probs of a chat server's reply."""

import functools
import math
from collections.abc import Iterable, Sequence

from alphagrpo_jax.rewards.verifiers.answer_finder import opened_by
from alphagrpo_jax.rewards.verifiers.base import Answer, Rating
from alphagrpo_jax.rewards.verifiers.chat import thinking
from alphagrpo_jax.rewards.verifiers.chat.replies import Candidate, Completion
from alphagrpo_jax.rewards.verifiers.spelling import MIN_MASS, RATINGS, normalize_word

# Candidates are mostly the same few words.
_word = functools.lru_cache(maxsize=4096)(normalize_word)
MAX_UNSPLIT = 0.02  # share of "1" up to which it counts as 1 although it may begin "10"


def read_answer(reply: Completion, *, text_fallback: bool, min_mass: float = MIN_MASS) -> Answer:
    """Computes P(yes) / (P(yes) + P(no)) over the candidates of the token that is read.

    Args:
      reply: with log-probs; all spellings of a word are summed.
      text_fallback: if neither is a candidate, a text that is exactly yes or no counts as 1 or 0.
      min_mass: P(yes) + P(no) below which neither counts as a candidate.
    """
    candidates = reply.candidates or ()
    yes, no = (_mass(candidates, word) for word in ("yes", "no"))
    if yes + no >= min_mass and yes + no > 0:
        return Answer(yes / (yes + no), mass=min(yes + no, 1.0))
    text = normalize_word(thinking.answer_text(reply.text))
    if text_fallback and text in ("yes", "no"):
        return Answer(float(text == "yes"))
    tokens = [candidate.token[:40] for candidate in candidates[:5]]
    hint = ""
    if any(opened_by(token) for token in tokens):
        hint = "; the judge thinks: set verifier.read='after_thinking' or verifier.extra_body"
    return Answer(
        None,
        f"neither yes nor no among the candidates {tokens} (mass {yes + no:.2g}, expected at least "
        f"{min_mass:g}){hint}",
    )


def read_rating(reply: Completion, *, text_fallback: bool) -> Rating:
    """Computes the expected value over the numbers 0 to 10.

    Many tokenizers write "10" as "1", "0". Where "10" is no candidate, the mass of "1" is split
    between 1 and 10 by the second token's candidates. These are known only if "1" was the token
    generated; otherwise a small share of "1" counts as 1, and a larger one is a failure.

    Args:
      reply: with log-probs of the first token, and of the later ones if there are any.
      text_fallback: if no number can be read from the log-probs, a text that is exactly a number
        counts as that rating.
    """
    candidates = reply.candidates or ()
    mass = [_mass(candidates, number) for number in RATINGS]
    total = sum(mass)
    if total >= MIN_MASS:
        if mass[10] or not mass[1]:
            return Rating(_mean(mass))
        if reply.later and _begins_with_one(candidates):
            ten = mass[1] * _mass(reply.later[0], "0")
            ends = (c for c in reply.later[0] if not _word(c.token)[:1].isdigit())
            mass[1], mass[10] = mass[1] * sum(math.exp(c.logprob) for c in ends), ten
            if sum(mass) >= MIN_MASS:
                return Rating(_mean(mass))
        elif mass[1] <= MAX_UNSPLIT * total:
            return Rating(_mean(mass))
    text = normalize_word(thinking.answer_text(reply.text))
    if text_fallback and text in RATINGS:
        return Rating(float(text))
    return Rating(None, f"no number from 0 to 10 can be read (mass {total:.2g})")


def _begins_with_one(candidates: Sequence[Candidate]) -> bool:
    """Returns True if the greedy first token, i.e. the likeliest, is "1"."""
    return _word(max(candidates, key=lambda c: c.logprob).token) == "1"


def _mass(candidates: Iterable[Candidate], word: str) -> float:
    """Sums the probabilities of the candidates that spell a word."""
    return sum(math.exp(c.logprob) for c in candidates if _word(c.token) == word)


def _mean(mass: Sequence[float]) -> float:
    """Computes the expected number, where `mass[n]` is the mass of n."""
    return sum(value * share for value, share in enumerate(mass)) / sum(mass)
