"""Explains rewards: for every image its questions, the answers and the reward made of them.

Pure: rows in, text out (one HTML file without scripts, CSV or JSON). Prompts, questions and think
texts are foreign text: in HTML they are escaped, whatever they hold.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from alphagrpo_jax import score_specs
from alphagrpo_jax.config import RewardOptions
from alphagrpo_jax.rewards.curves import FRAME, SMOOTH, Panel
from alphagrpo_jax.rewards.scoring import (
    HOLISTIC,
    Rewards,
    rating_questions,
    score_weights,
    scored_texts,
)
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.results import Change
from alphagrpo_jax.runtime.texts import printable

TEMPLATE = "report.html.jinja"
CSV_FIELDS = (
    "image", "prompt", "total", "semantic", "quality", "failure", "kind", "tag", "question", "value"
)  # fmt: skip


class AnswerLine(NamedTuple):
    """One question about an image, or text that it is scored by, and the answer."""

    kind: str  # "semantic", "quality", "rating" or "score"
    tag: str  # of a score: its name
    question: str
    value: float  # P(yes), a rating from 0 to 10, or a score

    @property
    def share(self) -> float | None:
        """Returns the value as a share of the best one; None for scores, which have no best one."""
        if self.kind == "score":
            return None
        return self.value / 10.0 if self.kind == "rating" else self.value


@dataclasses.dataclass(frozen=True)
class Row:
    """One image with everything that is known about its reward; None: not known."""

    name: str
    prompt: str
    image: str  # a data: URL
    total: float | None  # the reward, in [0, 1] without scorers; None if it has none
    semantic: float | None
    quality: float | None
    failure: str | None  # why there is no reward
    lines: tuple[AnswerLine, ...]  # empty if there is no reward
    by_score: Mapping[str, float]  # empty where there is only one score
    think: str | None = None
    exact: bool | None = None  # the exact checker's verdict


class Tag(NamedTuple):
    """The answers to all questions of a kind and tag, or the scores of one scorer."""

    kind: str
    tag: str
    count: int
    mean: float  # P(yes), rating or score
    yes: float | None  # share of the answers above 1/2; None for ratings and scores


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of a report."""

    title: str
    how: str  # the reward is computed
    rows: tuple[Row, ...]
    images_without_record: tuple[str, ...] = ()
    records_without_image: tuple[str, ...] = ()
    files_passed_over: tuple[str, ...] = ()  # of the folder, that are no images that can be read
    first_pages: tuple[str, ...] = ()  # images of several pages, of which the first was read
    panels: tuple[Panel, ...] = ()  # learning curves, of a run's report alone
    changes: tuple[Change, ...] = ()  # held-out results before and after, likewise

    @property
    def worst_first(self) -> list[Row]:
        """Returns images without a reward, then those of the lowest rewards; ties in order."""
        return sorted(self.rows, key=lambda row: -math.inf if row.total is None else row.total)

    @property
    def mean(self) -> float | None:
        """Returns the mean reward of the images that have one."""
        totals = [row.total for row in self.rows if row.total is not None]
        return math.fsum(totals) / len(totals) if totals else None

    @property
    def failed(self) -> int:
        """Counts the images without a reward."""
        return sum(row.total is None for row in self.rows)

    @property
    def name_lists(self) -> list[tuple[str, tuple[str, ...]]]:
        """Returns headings with the names that stand under them, those without names left out."""
        lists = [
            ("Images without a record", self.images_without_record),
            ("Records without an image", self.records_without_image),
            ("Files passed over", self.files_passed_over),
            ("Images of several pages, the first was read", self.first_pages),
        ]
        return [(heading, names) for heading, names in lists if names]

    @property
    def smoothed(self) -> bool:
        """Returns whether a curve is shown as means over several steps."""
        return any(line.raw for panel in self.panels for line in panel.lines)

    @property
    def tags(self) -> list[Tag]:
        """Averages answers by kind and tag, over images with a reward; semantic tags first."""
        values_by_tag: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            for line in row.lines:
                values_by_tag.setdefault((line.kind, line.tag), []).append(line.value)
        order = ("semantic", "quality", "rating", "score")
        return [
            Tag(
                *key,
                len(values),
                math.fsum(values) / len(values),
                None
                if key[0] in ("rating", "score")
                else sum(v > 0.5 for v in values) / len(values),
            )
            for key, values in sorted(
                values_by_tag.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
            )
        ]


def rows(
    names: Sequence[str],
    images: Sequence[str],
    records: Sequence[Record],
    scores: Rewards,
    options: RewardOptions,
    *,
    thinks: Sequence[str | None] | None = None,
    exact: Sequence[bool | None] | None = None,
) -> list[Row]:
    """Makes the rows of the first N samples of a batch.

    Args:
      names: N.
      images: data: URLs, N.
      records: at least N, as they were scored.
      scores: from `scoring.gather`.
      options: how they were made of the answers.
      thinks: think texts.
      exact: verdicts of the exact checker.
    """
    report_rows = []
    for index, name in enumerate(names):
        record, valid = records[index], bool(scores.valid[index])
        by_score = scores.shown_scores if valid else {}
        report_rows.append(
            Row(
                name=name,
                prompt=record.prompt,
                image=images[index],
                total=_finite(scores.reward[index]),
                semantic=_finite(scores.semantic[index]),
                quality=_finite(scores.quality[index]),
                failure=None if valid else scores.reasons[index] or "no answer",
                lines=_lines(record, scores, index, options) if valid else (),
                by_score={score: float(values[index]) for score, values in by_score.items()},
                think=None if thinks is None else thinks[index],
                exact=None if exact is None else exact[index],
            )
        )
    return report_rows


def describe(options: RewardOptions) -> str:
    """Says in words how the reward is computed."""
    words = []
    for text, weight in zip(options.scores, score_weights(options), strict=True):
        spec = score_specs.parse(text)
        if spec is not None:
            low, high = spec.range
            formula = f"{text}, {low:g} counts as 0 and {high:g} as 1"
        elif text == HOLISTIC:
            formula = "least ratings, geometric mean / 10"
        else:
            formula = options.aggregate
            if options.dependencies:
                formula += ", a question counts only if those it depends on hold"
        share = f"{weight:.3g} x " if len(options.scores) > 1 else ""
        words.append(f"{share}{score_specs.short_name(text)} ({formula})")
    return " + ".join(words)


def to_html(report: Report) -> str:
    """Renders a self-contained page: curves if there are any, then images, the worst first."""
    return printable(_template().render(report=report, frame=FRAME, smooth=SMOOTH))


def to_csv(report: Report) -> str:
    """Writes a line per question, or per image without answers, under `CSV_FIELDS`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for row in report.worst_first:
        numbers = ("" if x is None else repr(x) for x in (row.total, row.semantic, row.quality))
        image_cells = (row.name, row.prompt, *numbers, row.failure or "")
        for line in row.lines or (("", "", "", ""),):
            writer.writerow((*image_cells, *line))
    return printable(file.getvalue())


def to_json(report: Report) -> str:
    """Writes an object with the summary and a list of images, without their pixels."""
    images = []
    for row in report.worst_first:
        fields: dict[str, Any] = {
            "parts" if name == "by_score" else name: value
            for name, value in vars(row).items()
            if name != "image"
        }
        images.append(fields | {"lines": [line._asdict() for line in row.lines]})
    summary = {
        "title": report.title,
        "how": report.how,
        "mean": report.mean,
        "failed": report.failed,
        "tags": [tag._asdict() for tag in report.tags],
        "images_without_record": list(report.images_without_record),
        "records_without_image": list(report.records_without_image),
        "files_passed_over": list(report.files_passed_over),
        "first_pages": list(report.first_pages),
        "images": images,
    }
    return json.dumps(summary, indent=1, allow_nan=False) + "\n"


FORMATS = {".html": to_html, ".csv": to_csv, ".json": to_json}  # by a file's ending


def _lines(
    record: Record, scores: Rewards, index: int, options: RewardOptions
) -> tuple[AnswerLine, ...]:
    answers, ratings = scores.p_yes[index], scores.ratings[index]
    questions = record.asked_questions if answers else []
    cut = len(record.asked_semantic)
    lines = [
        AnswerLine("semantic" if at < cut else "quality", question.tag, question.text, p)
        for at, (question, p) in enumerate(zip(questions, answers, strict=True))
    ]
    tags = ["semantic"] * len(options.rate_semantic) + ["quality"] * len(options.rate_quality)
    rated = zip(tags, rating_questions(options, record), ratings, strict=False)
    names = [spec.name for spec in options.scorers]
    scored = [
        AnswerLine("score", name, text, float(scores.by_score[name][index]))
        for name, text in zip(names, scored_texts(options, record), strict=True)
    ]
    return (*lines, *(AnswerLine("rating", *rating) for rating in rated), *scored)


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE)
