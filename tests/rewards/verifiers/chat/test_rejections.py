"""When a text counts as one that no server accepts."""

from alphagrpo_jax.rewards.verifiers.chat.rejections import REJECTIONS, Rejections, Subject

BAD, GOOD = Subject("question", "Is it a unicorn?"), Subject("question", "Is it red?")
RATING = Subject("rating", "How red is it?")
URL, OTHER_URL = "http://a/v1", "http://b/v1"


def is_hopeless_after(between, *, times: int = 4 * REJECTIONS) -> bool:
    """Whether BAD counts as hopeless at any time; `between(rejections)` follows each rejection."""
    rejections, verdicts = Rejections(), []
    for _ in range(times):
        rejections.rejected(BAD, URL)
        verdicts.append(rejections.is_hopeless(BAD))
        between(rejections)
    return any(verdicts)


def answer(subject: Subject, url: str = URL, *, answered: bool = True):
    return lambda rejections: rejections.accepted(subject, url, answered=answered)


def test_a_text_is_hopeless_once_a_working_server_has_rejected_it_often():
    assert is_hopeless_after(answer(GOOD))
    assert not is_hopeless_after(answer(GOOD), times=REJECTIONS - 1)
    assert not Rejections().is_hopeless(BAD)


def test_a_server_that_rejects_everything_says_nothing():
    assert not is_hopeless_after(lambda rejections: rejections.rejected(GOOD, URL))
    assert not is_hopeless_after(answer(GOOD, OTHER_URL))  # one server works, the other does not
    assert not is_hopeless_after(answer(RATING))  # it does not know a field of questions
    assert not is_hopeless_after(answer(GOOD, answered=False))


def test_a_text_that_was_taken_meanwhile_is_not_hopeless():
    def take(rejections):
        rejections.accepted(GOOD, URL, answered=True)
        rejections.accepted(BAD, OTHER_URL, answered=False)

    assert not is_hopeless_after(take)


def test_an_outage_counts_as_one_round():
    rejections = Rejections()
    for _ in range(10 * REJECTIONS):
        rejections.rejected(BAD, URL)
    rejections.accepted(GOOD, URL, answered=True)
    rejections.rejected(BAD, URL)  # a stray one behind it
    assert not rejections.is_hopeless(BAD)
