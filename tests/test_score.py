"""The score command: matching, reports, and what is said about bad input."""

import dataclasses
import json
import os
import pathlib

import bad_server
import numpy as np
import pytest
import tiny_verifiers
import tiny_world
from bad_server import BadServer
from PIL import Image

from alphagrpo_jax import score
from alphagrpo_jax.config_checks import from_config_dict, read_config, to_json
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.records import parse_record

HONEST = ("--verifier", "callable:tiny_verifiers:Honest", "--workers", "1")


def records(*ids):
    return [
        parse_record(tiny_world.record(f"shape {n}") | ({} if name is None else {"id": name}))
        for n, name in enumerate(ids)
    ]


def matched(names, ids):
    matches = score.match_images([pathlib.Path(name) for name in names], records(*ids))
    return {path.name: number for path, number in matches.pairs}, matches.images, matches.records


def test_by_id_or_place_one_or_several():
    names = ["cat.png", "cat_0.png", "cat_1.jpg", "2.png", "0002_3.png", "9.png", "dog.png"]
    pairs, images, without_image = matched(names, [None, "cat", None, "bird"])
    assert pairs == {"cat.png": 1, "cat_0.png": 1, "cat_1.jpg": 1, "2.png": 2, "0002_3.png": 2}
    assert images == ["9.png", "dog.png"]
    assert without_image == [0, 3]


def test_whole_ids_go_first_and_ids_before_places():
    pairs, images, without_image = matched(
        ["a_1.png", "1.png", "0.png", "_1.png"], ["a", "a_1", "0", "1"]
    )
    assert pairs == {"a_1.png": 1, "1.png": 3, "0.png": 2}
    assert images == ["_1.png"]
    assert without_image == [0]


def test_equal_ids_are_refused():
    with pytest.raises(ValueError, match=r"records 0 and 2 .* both have the id 'a'"):
        matched(["a.png"], ["a", None, "a"])


@pytest.fixture
def folder(tmp_path):
    """Three records and images of the first two."""
    rows = [tiny_world.record(f"shape {n}") for n in range(3)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name in ("0.png", "1_0.png", "1_1.png"):
        Image.fromarray(rng.integers(0, 256, (8, 6, 3), np.uint8)).save(images / name)
    return tmp_path


def flags(folder, out, *more):
    files = ("--images", folder / "images", "--records", folder / "records.jsonl")
    return [str(value) for value in (*files, "--out", folder / out, *(more or HONEST))]


def test_a_report_holds_what_the_verifier_said(folder, capsys):
    (folder / "images" / "stray.png").write_bytes((folder / "images" / "0.png").read_bytes())
    (folder / "images" / "notes.txt").write_text("no image")
    assert score.main(flags(folder, "new/report.json")) == 0
    report = json.loads((folder / "new" / "report.json").read_text())
    assert {image["name"] for image in report["images"]} == {"0.png", "1_0.png", "1_1.png"}
    for image in report["images"]:
        pixels = np.asarray(Image.open(folder / "images" / image["name"]))
        questions = [line["question"] for line in image["lines"]]
        honest = [answer.p_yes for answer in tiny_verifiers.Honest().answer(pixels, questions)]
        assert [line["value"] for line in image["lines"]] == honest
        semantic, quality = np.mean(honest[:2]), honest[2]
        assert image["total"] == pytest.approx(np.sqrt(semantic * quality))
    assert report["images_without_record"] == ["stray.png"]
    assert report["records_without_image"] == ["2: shape 2"]
    printed = capsys.readouterr().out
    assert "3 images, mean reward" in printed
    assert "Records without an image (1): 2: shape 2" in printed
    assert report["files_passed_over"] == ["notes.txt"]
    assert "Files passed over (1): notes.txt" in printed


def test_files_that_are_passed_over_and_first_pages_are_named(folder, capsys):
    images = folder / "images"
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pages[0].save(images / "2.TIFF", save_all=True, append_images=pages[1:])
    for name in ("1_2.heic", "1_3.psd", ".hidden"):
        (images / name).write_text("x")
    (images / "more").mkdir()
    (images / os.fsdecode(b"\xff.txt")).write_text("x")  # a name that UTF-8 cannot hold
    for ending in (".json", ".html", ".csv"):
        assert score.main(flags(folder, f"report{ending}")) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["files_passed_over"] == ["1_2.heic", "1_3.psd", "more/", "\udcff.txt"]
    assert report["first_pages"] == ["2.TIFF"]
    assert "2.TIFF" in {image["name"] for image in report["images"]}
    printed = capsys.readouterr().out
    assert "Files passed over (4): 1_2.heic, 1_3.psd, more/, \\udcff.txt" in printed
    assert "Images of several pages, the first was read (1): 2.TIFF" in printed
    page = (folder / "report.html").read_text()
    assert "1_2.heic" in page
    assert "the first was read" in page


def test_a_file_damaged_behind_its_first_page_costs_no_answer(folder, capsys):
    path = folder / "images" / "2.tiff"
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    contents = path.read_bytes()
    for length in range(len(contents) - 1, 0, -1):  # until the first page is all that can be read
        path.write_bytes(contents[:length])
        if images_lib.count_pages(path) is None:
            break
    images_lib.open_rgb(path)
    assert score.main(flags(folder, "report.json")) == 0
    report = json.loads((folder / "report.json").read_text())
    assert [image["failure"] for image in report["images"]] == [None] * 4
    assert report["first_pages"] == ["2.tiff (damaged, the number of pages is not known)"]
    assert "2.tiff (damaged" in capsys.readouterr().out


def test_scorers_may_be_part_of_the_score(folder):
    scorers = ("--extra-scores", "callable:tiny_verifiers:redness?range=0..255")
    assert score.main(flags(folder, "x.json", *HONEST, *scorers, "--extra-weights", "3")) == 0
    images = json.loads((folder / "x.json").read_text())["images"]
    for image in images:
        picture = np.asarray(Image.open(folder / "images" / image["name"]).convert("RGB"))
        (redness,) = tiny_verifiers.redness([picture], [image["prompt"]])
        shares = image["parts"]
        assert shares["callable.redness"] == pytest.approx(redness)
        assert image["total"] == pytest.approx((shares["confidence"] + 3 * redness / 255.0) / 4)


def test_an_unreadable_image_costs_only_itself(folder, capsys):
    content = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "2.png").write_bytes(content[: len(content) // 2])
    assert score.main(flags(folder, "report.html")) == 1
    errors = capsys.readouterr().err
    assert "1 of 4 images have no score" in errors
    assert "2.png is not a readable image" in errors
    text = (folder / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "not a readable image" in text
    assert score.main([*flags(folder, "report.html"), "--allow-failures", "1"]) == 0


def test_an_endpoint_that_gives_no_answer_is_stated(folder, tmp_path, capsys):
    with BadServer(tmp_path) as server:
        remote = ("--verifier", f"openai:{server.url}", "--model", bad_server.MODEL)
        remote += ("--workers", "1", "--attempts", "1")
        assert score.main(flags(folder, "good.csv", *remote)) == 0
        server.behave("400")
        assert score.main(flags(folder, "bad.csv", *remote)) == 1
    assert "3 of 3 images have no score" in capsys.readouterr().err
    lines = (folder / "bad.csv").read_text().splitlines()
    assert len(lines) == 4
    assert all(",,,," in line for line in lines[1:])  # no number anywhere
    assert len((folder / "good.csv").read_text().splitlines()) == 1 + 3 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "images").rename(f / "elsewhere"), "expected a folder of images"),
        (
            lambda f: [p.unlink() for p in (f / "images").iterdir()],
            "no image in it: got an empty folder",
        ),
        (lambda f: (f / "records.jsonl").write_text("{no\n"), "records.jsonl:1: "),
        (lambda f: (f / "records.jsonl").unlink(), "no file of question records"),
        (lambda f: (f / "report.html").mkdir(), "is a folder"),
    ],
)
def test_bad_input_is_explained(folder, capsys, change, message):
    change(folder)
    assert score.main(flags(folder, "report.html")) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors


def test_a_bug_in_scoring_keeps_its_traceback(folder, monkeypatch, capsys):
    def broken(*_, **__):
        return np.zeros(2) + np.zeros(3)  # a ValueError of NumPy

    monkeypatch.setattr(scoring, "dvreward", broken)
    with pytest.raises(ValueError, match="could not be broadcast") as caught:
        score.main(flags(folder, "report.html"))
    assert caught.traceback[-1].name == "broken"
    assert "error: " not in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_no_match_at_all(folder, capsys):
    for path in (folder / "images").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    assert score.main(flags(folder, "report.html")) == 1
    assert "none of the 3 images" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_a_place_that_cannot_be_written_is_found_before_asking(folder, capsys):
    (folder / "file").write_text("")
    assert score.main(flags(folder, "file/report.html", "--verifier", "callable:no:thing")) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ("--out", "report.pdf"),
        ("--score", "warmth"),
        ("--verifier", "openai:http://127.0.0.1:1/v1"),
        ("--workers", "0"),
        ("--cache-size", "-1"),
        ("--api-key-env", "sk-0123456789"),
    ],
)
def test_wrong_usage(folder, wrong, capsys):
    arguments = [*flags(folder, "report.html"), *wrong]
    try:
        code = score.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "sk-0" not in capsys.readouterr().err


@pytest.fixture
def run_folder(tmp_path):
    """run_folder(**verifier): the folder of a run with these options of its verifier."""

    def write(**verifier):
        config = tiny_world.config(tmp_path)
        config.verifier.update(verifier)
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(to_json(from_config_dict(config)))
        return str(run)

    return write


def test_a_judge_that_thinks_scores_as_in_its_run(folder, tmp_path, run_folder, monkeypatch):
    """By options alone, and by those of a run; the servers' log tells what was asked."""
    monkeypatch.setenv("JUDGE_KEY", "test-key")
    audit = tmp_path / "audit.jsonl"
    options = {
        "read": "after_thinking",
        "max_tokens": 99,
        "instruction": "Think first, then say yes or no.",
        "min_mass": 0.5,
        "extra_body": '{"chat_template_kwargs": {"enable_thinking": true}}',
        "concurrency": 2,
        "question_seconds": 20.0,
    }
    texts = [f"--verifier-option={name}={value}" for name, value in options.items()]
    with BadServer(tmp_path) as server:
        server.behave("think")
        remote = ("--verifier", f"openai:{server.url}", "--model", bad_server.MODEL)
        assert (
            score.main(flags(folder, "first.json", *remote, "--attempts", "1")) == 1
        )  # the thinking is not read
        asked = len(server.log())
        assert score.main(flags(folder, "options.json", *remote, *texts)) == 0
        run = run_folder(
            kind="openai",
            endpoints=(server.url,),
            model=bad_server.MODEL,
            api_key_env="JUDGE_KEY",
            audit=str(audit),
            second=f"openai:{server.url}",
            **options,
        )
        assert score.main(flags(folder, "run.json", "--verifier-of", run)) == 0
        log = server.log()[asked:]
    assert len(log) == 2 * 3 * 3
    for request in log:
        assert (request["system"], request["max_tokens"]) == (options["instruction"], 99)
        assert request["extra"] == {"chat_template_kwargs": {"enable_thinking": True}}
    reports = [json.loads((folder / f"{name}.json").read_text()) for name in ("options", "run")]
    assert reports[0]["images"] == reports[1]["images"]
    for image in reports[0]["images"]:
        pixels = np.asarray(Image.open(folder / "images" / image["name"]))
        for line in image["lines"]:
            truth = bad_server.truth(pixels, line["question"])
            assert line["value"] == pytest.approx(truth, abs=1e-9)
    assert reports[1]["title"].endswith(f"judged by the verifier of {run}")
    assert not audit.exists()  # the run's own log is left alone


def test_flags_go_before_the_run_and_options_before_flags(folder, run_folder):
    def verifier(*more):
        arguments = flags(folder, "a.csv", *more)
        return score.verifier_config(score.parse_flags(arguments)).verifier

    default = read_config().verifier
    plain = verifier("--attempts", "4")
    assert dataclasses.replace(plain, total_seconds=default.total_seconds) == default
    run = run_folder(workers=7, top_k=3, dtype="bfloat16", min_mass=0.4)
    judged = verifier("--verifier-of", run, "--workers", "5", "--verifier-option", "min_mass=1e-3")
    assert (judged.kind, judged.path) == ("callable", "tiny_verifiers:Honest")
    assert (judged.workers, judged.top_k, judged.dtype) == (5, 3, "bfloat16")
    assert judged.min_mass == 1e-3
    texts = ("text_fallback=True", "endpoints=http://a/v1,http://b/v1", "workers=2")
    options = [f"--verifier_option={text}" for text in (*texts, "model=x", "instruction=a=b")]
    judged = verifier("--workers", "5", *options)
    assert (judged.text_fallback, judged.workers, judged.instruction) == (True, 2, "a=b")
    assert judged.endpoints == ("http://a/v1", "http://b/v1")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("read=last", "config.verifier.read: got 'last', expected one of ('first', 'after_"),
        ("max_tokens=many", "config.verifier.max_tokens: got 'many', expected int at least 1"),
        ("max_tokens=1.5", "config.verifier.max_tokens: got 1.5, expected int at least 1"),
        ("min_mass=nan", "config.verifier.min_mass: got 'nan', expected float at least 1e-06"),
        ("min_mass=2", "config.verifier.min_mass: got 2, expected float"),
        ("concurrency=0", "config.verifier.concurrency: got 0, expected int at least 1"),
        ("text_fallback=perhaps", "config.verifier.text_fallback: got 'perhaps', expected bool"),
        ("instruction=  ", "config.verifier.instruction: got '  ', expected a text"),
        ("extra_body=[1]", "config.verifier.extra_body: got '[1]', expected a JSON object"),
        ("thinking=yes", "config.verifier: unknown keys ['thinking']; known: ['api_key_env'"),
        ("read", "--verifier-option: expected NAME=VALUE"),
        ("second=package:verifier", "one verifier judges here"),
    ],
)
def test_wrong_options_of_the_verifier_are_named(folder, capsys, option, message):
    try:
        code = score.main(flags(folder, "a.csv", "--verifier-option", option))
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_runs_whose_verifier_cannot_judge_here_are_explained(folder, run_folder, capsys):
    def error(*more):
        assert score.main(flags(folder, "a.csv", *more)) in (1, 2)
        return capsys.readouterr().err

    assert "is not a run's folder" in error("--verifier-of", str(folder))
    run = run_folder(kind="self", path="")
    assert "judges its own images in training only" in error("--verifier-of", run)
    with pytest.raises(SystemExit):
        error(*HONEST, "--verifier-of", run)
    assert "give one of them" in capsys.readouterr().err


def test_answers_are_remembered_if_asked_for(folder):
    def size(*more):
        return score.verifier_config(
            score.parse_flags([*flags(folder, "a.csv"), *more])
        ).verifier.cache_size

    assert (size(), size("--cache-size", "99")) == (0, 99)
