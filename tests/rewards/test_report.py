"""Reports by hand: what they say, in which order, and that foreign text stays text."""

import csv
import dataclasses
import html.parser
import io
import json
import math
import re

import pytest
import tiny_world
from default_options import reward_options

from alphagrpo_jax.rewards import curves, report, scoring
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.runtime.results import changes

URL = "data:image/png;base64,AAAA"
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} {% raw %} &amp;'


KIND = "<b>plain & simple"


class FixedPool:
    """A pool with fixed outcomes."""

    def __init__(self, *outcomes):
        self.outcomes = outcomes

    def gather(self, ids):
        return {sample_id: self.outcomes[sample_id] for sample_id in ids}


class Page(html.parser.HTMLParser):
    """The tags, attributes and words of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def report_of(*outcomes, prompts=None, extra=(), **columns):
    prompts = prompts or [f"shape {number}" for number in range(len(outcomes))]
    records = [parse_record(tiny_world.record(prompt)) for prompt in prompts]
    names, weights = tuple(name for name, _ in extra), tuple(weight for _, weight in extra)
    options = reward_options(extra_scores=names, extra_weights=weights)
    ids = range(len(outcomes))
    scores = scoring.gather(FixedPool(*outcomes), ids, records, (), options)
    names = [f"{number}.png" for number in ids]
    rows = report.rows(names, [URL] * len(names), records, scores, options, **columns)
    return report.Report("drawings", report.describe(options), tuple(rows), ("stray.png",), ("7",))


def answered(*p_yes, ratings=()):
    return VerifierResult(p_yes, True, None, 1, 0, 0.1, ratings)


FAILED = VerifierResult(None, False, "server away <b>", 4, None, 9.0)


@pytest.fixture
def three():
    """Good, failed, bad."""
    return report_of(answered(0.9, 0.7, 0.8), FAILED, answered(0.1, 0.3, 0.6))


def test_worst_first_and_failures_before_all(three):
    assert [row.name for row in three.worst_first] == ["1.png", "2.png", "0.png"]
    failed, bad, good = three.worst_first
    assert (failed.total, failed.lines, failed.failure) == (None, (), "server away <b>")
    assert bad.total == pytest.approx(math.sqrt(0.2 * 0.6))
    assert (good.semantic, good.quality) == (pytest.approx(0.8), pytest.approx(0.8))
    assert three.mean == pytest.approx((math.sqrt(0.12) + 0.8) / 2)
    assert three.failed == 1
    assert [line.value for line in good.lines] == [0.9, 0.7, 0.8]
    assert [(line.kind, line.tag) for line in good.lines] == [
        ("semantic", "Existence"), ("semantic", "Existence"), ("quality", "Texture")
    ]  # fmt: skip


def test_tags_count_only_what_was_answered(three):
    existence, texture = three.tags
    assert existence[:3] == ("semantic", "Existence", 4)
    assert (existence.mean, existence.yes) == (pytest.approx(0.5), 0.5)
    assert texture[:3] == ("quality", "Texture", 2)
    assert (texture.mean, texture.yes) == (pytest.approx(0.7), 1.0)


def test_ratings_and_several_scores():
    scored = report_of(answered(0.9, 0.7, 0.8, ratings=(8.0, 2.0)), extra=(("holistic", 1.0),))
    (row,) = scored.rows
    assert row.by_score == pytest.approx({"confidence": 0.8, "holistic": 0.4})
    assert row.total == pytest.approx(0.6)
    assert row.lines[-2] == (
        "rating", "semantic", "How well does the image match the prompt: shape 0?", 8.0
    )  # fmt: skip
    assert row.lines[-1].share == 0.2
    assert scored.tags[-1] == ("rating", "semantic", 1, 8.0, None)
    assert scored.how.startswith("0.5 x confidence (geometric) + 0.5 x holistic (")


def test_csv_has_a_line_per_question(three):
    lines = list(csv.DictReader(io.StringIO(report.to_csv(three))))
    assert len(lines) == 1 + 3 + 3
    assert lines[0]["failure"] == "server away <b>"
    assert lines[0]["total"] == lines[0]["question"] == ""
    assert float(lines[1]["total"]) == three.worst_first[1].total
    assert [float(line["value"]) for line in lines[1:4]] == [0.1, 0.3, 0.6]
    assert lines[4]["question"] == "Is there shape 0?"


def test_json_has_everything_but_pixels(three):
    text = report.to_json(three)
    assert URL not in text
    contents = json.loads(text)
    assert contents["failed"] == 1
    assert contents["images_without_record"] == ["stray.png"]
    assert contents["records_without_image"] == ["7"]
    assert contents["images"][0]["total"] is None
    assert contents["images"][2]["lines"][2] == {
        "kind": "quality", "tag": "Texture", "question": "Is it flat?", "value": 0.8
    }  # fmt: skip
    assert contents["tags"][0]["count"] == 4


def test_html_holds_its_images_and_asks_for_nothing_else(three):
    page = Page(report.to_html(three))
    images = [value for name, value in page.attributes if name == "src"]
    assert images == [URL] * 3
    assert "script" not in page.tags
    assert not any(name in ("href", "action") for name, _ in page.attributes)
    text = " ".join(page.words)
    for words in ("server away <b>", "stray.png", "0.346", "Is there shape 2?", "Texture"):
        assert words in text
    assert text.index("shape 1") < text.index("shape 2") < text.index("shape 0")


def test_a_run_opens_with_its_curves_and_asks_for_nothing_else(three):
    rows = [
        {"step": 0, "eval/reward/mean": 0.5, "eval/exact_all": 0.25, f"eval/exact_all/{KIND}": 0.5},
        {"step": 1, "reward/mean": 0.25},
        {"step": 2, "eval/reward/mean": 0.75, "eval/exact_all": 1.0, f"eval/exact_all/{KIND}": 1.0},
    ]
    run = dataclasses.replace(three, panels=curves.panels(rows), changes=tuple(changes(rows)))
    text = report.to_html(run)
    page = Page(text)
    assert page.tags.count("svg") == 2
    assert page.tags.count("polyline") == 4  # training, held-out; all, the kind
    assert page.tags.count("circle") == 1 + 3 * 2
    assert "script" not in page.tags
    assert "://" not in text
    assert "url(" not in text
    assert not {name for name, _ in page.attributes} & {"href", "action", "xlink:href", "onload"}
    assert {value for name, value in page.attributes if name == "src"} == {URL}
    assert text.index("<svg") < text.index("Held-out results") < text.index("<article")
    assert f"{KIND} 1.000" in page.words  # beside the curve
    at = page.words.index(KIND)
    assert [word for word in page.words[at + 1 : at + 6] if word.strip()][:2] == ["0.500", "1.000"]
    assert "<svg" not in report.to_html(three)  # the report of a folder has no curves


def test_a_run_without_images_has_its_curves_alone():
    row = {"step": 0, "eval/reward/mean": 0.5}
    text = report.to_html(report.Report("ti2t, step 0", "", (), panels=curves.panels([row])))
    assert "<svg" in text
    assert "Samples" not in text
    assert "images" not in Page(text).words


def test_columns_break_no_words(three):
    style = report.to_html(three).partition("<style>")[2].partition("</style>")[0]
    assert "anywhere" not in style
    assert "break-all" not in style
    cells = re.search(r"th, td \{(.*?)\}", style)[1]
    assert "white-space: nowrap" in cells
    assert "prefers-color-scheme: dark" in style


def test_hostile_texts_stay_text():
    scored = report_of(
        answered(0.9, 0.7, 0.8), prompts=[HOSTILE], thinks=[f"<think>{HOSTILE}"], exact=[False]
    )
    plain = report_of(answered(0.9, 0.7, 0.8), thinks=["x"], exact=[False])
    page, expected = Page(report.to_html(scored)), Page(report.to_html(plain))
    assert page.tags == expected.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in expected.attributes]
    assert HOSTILE in page.words
    assert f"<think>{HOSTILE}" in page.words


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    scored = report_of(answered(0.9, 0.7, 0.8))
    row = dataclasses.replace(scored.rows[0], name="half \ud83d.png")  # as file systems may have it
    scored = dataclasses.replace(scored, rows=(row,))
    for ending, write in report.FORMATS.items():
        (tmp_path / f"x{ending}").write_text(write(scored), encoding="utf-8")


def test_nothing_scored():
    scored = report_of(FAILED)
    assert scored.mean is None
    assert scored.tags == []
    assert "without a reward" in report.to_html(scored)
    assert json.loads(report.to_json(scored))["mean"] is None
