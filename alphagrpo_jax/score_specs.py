"""Names of scores: those of the verifier's answers, and those of scorers, with their options.

A scorer is named `KIND:TARGET?option=value&option=value`, e.g.
`hf_clip:openai/clip-vit-base-patch32?range=0.1..0.4`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

ScorerKind = Literal["exact", "likelihood", "hf_clip", "callable"]
KINDS_BY_NAME: Mapping[str, ScorerKind] = {kind: kind for kind in get_args(ScorerKind)}

JUDGED = ("confidence", "binary", "holistic")  # made of a verifier's answers and ratings
EXPECTED = (
    "confidence, binary, holistic, exact, likelihood, hf_clip:PATH or callable:MODULE:FUNCTION"
)
# By kind of scorer, what `value` may be; the first is the default.
VALUES: Mapping[ScorerKind, tuple[str, ...]] = {
    "exact": (),
    "likelihood": ("probability", "log_prob"),
    "hf_clip": ("cosine", "logit", "probability"),
    "callable": (),
}
_SWITCH = {"yes": True, "no": False}


@dataclasses.dataclass(frozen=True)
class ScorerSpec:
    """A scorer as it is named in `reward.extra_scores`."""

    kind: ScorerKind
    target: str  # model folder or ORG/NAME for "hf_clip", MODULE:FUNCTION for "callable", else ""
    name: str  # in metrics, reports and the names of audit logs
    value: str = ""  # one of `VALUES`
    range: tuple[float, float] = (0.0, 1.0)  # scores that count as 0 and as 1 in the reward
    processor: str = ""  # folder or ORG/NAME of another processor than the model's own
    truncate: bool = False  # cut prompts that are longer than the model reads
    processes: int = 1  # that score
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def reads_prompts(self) -> bool:
        """True where the score compares the image with a text that describes it."""
        return self.kind in ("likelihood", "hf_clip")

    @property
    def has_processes(self) -> bool:
        """True where worker processes of its own score; the verifier computes likelihoods."""
        return self.kind != "likelihood"

    def read(self, number: float) -> float:
        """Returns the score that a worker's number means: of a mean log-prob its exponential."""
        if self.kind != "likelihood" or self.value != "probability":
            return number
        return math.exp(number) if number <= 0.0 else math.nan  # no log-prob is above 0

    def rescaled(self, score: Any) -> Any:
        """Returns what scores count in the reward: 0 and 1 at the ends of `range`, linear.

        Args:
          score: a number or an array of them.
        """
        low, high = self.range
        return score if (low, high) == (0.0, 1.0) else (score - low) / (high - low)


@functools.cache
def parse(text: str) -> ScorerSpec | None:
    """Reads the name of a score.

    Args:
      text: one of `JUDGED`, or a scorer.
    Returns:
      The scorer; None for a score of the verifier's answers.
    Raises:
      ValueError: no such score, or wrong options.
    """
    if text in JUDGED:
        return None
    location, mark, options = text.partition("?")
    kind_name, _, target = location.partition(":")
    kind = KINDS_BY_NAME.get(kind_name)
    if kind is None or bool(target) != (kind in ("hf_clip", "callable")):
        raise ValueError(f"got {text!r}, expected {EXPECTED}")
    if kind == "callable" and not re.fullmatch(r"[\w.]+:\w+", target):
        raise ValueError(
            f"got {text!r}, expected callable:MODULE:FUNCTION, e.g. callable:ocr:match"
        )
    if mark and not options:
        raise ValueError(f"got {text!r}, expected options behind the question mark")
    fields = _options(text, kind, options)
    default_name = f"{kind}.{_last_component(kind, target)}" if target else kind
    spec = ScorerSpec(kind, target, default_name, value="".join(VALUES[kind][:1]))
    return dataclasses.replace(spec, **fields)


def check(text: str) -> str:
    """Refuses what names no score; returns the text.

    Raises:
      ValueError: see `parse`.
    """
    parse(text)
    return text


def short_name(text: str) -> str:
    """Returns a score's name in metrics and reports.

    Raises:
      ValueError: see `parse`.
    """
    spec = parse(text)
    return text if spec is None else spec.name


def _options(text: str, kind: ScorerKind, options: str) -> dict[str, Any]:
    """Reads the options behind the question mark.

    Raises:
      ValueError: an option that the kind does not have, one twice, or a wrong value.
    """
    readers = _readers(kind)
    fields: dict[str, Any] = {}
    for option in options.split("&") if options else ():
        name, _, value = option.partition("=")
        if name not in readers or name in fields:
            raise ValueError(
                f"got the option {name!r} in {text!r}, expected each at most once of "
                f"{', '.join(readers)}"
            )
        fields[name] = readers[name](value)
    return fields


def _readers(kind: ScorerKind) -> dict[str, Callable[[str], Any]]:
    """Returns the options of a kind of scorer, each with the function that reads its value."""
    readers: dict[str, Callable[[str], Any]] = {"name": _read_name, "range": _read_range}
    if VALUES[kind]:
        readers["value"] = functools.partial(_read_choice, "value", VALUES[kind])
    if kind != "likelihood":
        readers["processes"] = _read_count
    if kind == "hf_clip":
        readers["truncate"] = lambda value: _SWITCH[_read_choice("truncate", _SWITCH, value)]
        readers |= {"processor": _read_path, "device": _read_word, "dtype": _read_word}
    return readers


def _last_component(kind: ScorerKind, target: str) -> str:
    """Returns the last component of a path, or the function's name, for use in metrics."""
    last = target.rstrip("/").rpartition(":" if kind == "callable" else "/")[2]
    return re.sub(r"[^\w.-]", "_", last.removeprefix("package:"))


def _read_choice(name: str, choices: Any, value: str) -> str:
    if value not in choices:
        raise ValueError(f"got {name}={value!r}, expected one of {', '.join(choices)}")
    return value


def _read_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value, re.ASCII) or value in JUDGED:
        raise ValueError(
            f"got name={value!r}, expected letters, digits, '_', '-' and '.', and none of "
            f"{', '.join(JUDGED)}"
        )
    return value


def _read_word(value: str) -> str:
    if not re.fullmatch(r"[\w:]+", value, re.ASCII):
        raise ValueError(f"got {value!r}, expected the name of a device or of a number format")
    return value


def _read_path(value: str) -> str:
    if not value:
        raise ValueError("got processor='', expected a folder or ORG/NAME of the hub")
    return value


def _read_count(value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", value, re.ASCII):
        raise ValueError(f"got processes={value!r}, expected a number from 1 to 9999")
    return int(value)


def _read_range(value: str) -> tuple[float, float]:
    low, _, high = value.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = (math.nan, math.nan)
    if not all(map(math.isfinite, ends)) or ends[0] == ends[1]:
        raise ValueError(f"got range={value!r}, expected two different numbers, e.g. 0.1..0.4")
    return ends
