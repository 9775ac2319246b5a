"""The context rules, row by row, as node indices worked out by hand."""

import pytest

from alphagrpo_jax import tasks
from alphagrpo_jax.tasks import ANSWER, GIVEN_IMAGE, IMAGE, SEEN_IMAGE, SYSTEM, TEXT, THINK


def contexts(events, step=-1):
    """(gen, cfg_text, cfg_img) of a step, as events."""
    plan = tasks.plan(events)
    chosen = plan.steps[step]
    return tuple(
        [plan.nodes[node].event for node in nodes]
        for nodes in (chosen.gen, chosen.cfg_text, chosen.cfg_img)
    )


def test_text_to_image():
    assert contexts((TEXT, IMAGE)) == ([0], [], [0])


def test_reasoning_text_to_image():
    plan = tasks.plan(tasks.TASKS["rt2i"].events)
    think, image = plan.steps
    assert [node.level for node in plan.nodes] == ["shared", "prompt", "trajectory"]
    assert plan.shared == (0,)
    assert (think.gen, think.node) == ((0, 1), 2)
    assert (image.gen, image.cfg_text, image.cfg_img) == ((0, 1, 2), (0,), (0, 1))
    assert image.node is None


def test_editing_computes_the_text_again_without_the_image():
    plan = tasks.plan((SYSTEM, GIVEN_IMAGE, TEXT, THINK, IMAGE))
    image = plan.image_steps[0]
    assert contexts((SYSTEM, GIVEN_IMAGE, TEXT, THINK, IMAGE)) == ([0, 1, 2, 3], [0, 1], [0, 2])
    with_image, without = image.gen[2], image.cfg_img[1]
    assert with_image != without
    assert plan.nodes[without].before == (0,)
    assert plan.nodes[with_image].before == (0, 1)


def test_an_answer_that_is_followed_enters_all_contexts():
    assert contexts((TEXT, ANSWER, TEXT, IMAGE)) == ([0, 1, 2], [0, 1], [0, 1, 2])


def test_a_generated_image_that_is_followed():
    events = (SYSTEM, TEXT, THINK, IMAGE, TEXT, THINK, IMAGE)
    assert contexts(events, 1) == ([0, 1, 2], [0], [0, 1])
    assert contexts(events) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1, 4])
    plan = tasks.plan(events)
    assert [step.index for step in plan.steps] == [0, 0, 1, 1]


def test_the_last_event_leaves_no_node():
    assert len(tasks.plan((TEXT, THINK)).nodes) == 1


@pytest.mark.parametrize("events", [(), (TEXT,), (THINK, "dance", IMAGE)])
def test_bad_lists_are_refused(events):
    with pytest.raises(ValueError, match=r"expected the last one|known"):
        tasks.plan(events)


@pytest.mark.parametrize(
    ("events", "fields", "message"),
    [
        ((TEXT, IMAGE, TEXT, IMAGE), {}, "has 1 texts for 2 events 'text'"),
        ((IMAGE,), {}, "has 1 texts for 0 events"),
        ((TEXT, IMAGE), {"texts": ("a", "b")}, "has 2 texts for 1 events"),
        ((GIVEN_IMAGE, SEEN_IMAGE, TEXT, ANSWER), {"image": "record"}, "is given 2 images"),
        ((GIVEN_IMAGE, TEXT, IMAGE), {}, r"image='' and 1 events .* expected one of \('record',"),
        ((SEEN_IMAGE, TEXT, ANSWER), {"image": "own"}, "image='own' and 1 events"),
        ((TEXT, IMAGE), {"image": "record"}, "image='record' and 0 events"),
    ],
)
def test_a_task_that_contradicts_its_events_is_refused(events, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.Task("own", events, **fields)


def test_a_text_counts_as_all_image_steps_that_follow_it():
    """Think, image, think, image with a window of 5: 10 and 5; an answer at the end: 1."""
    look_again = tasks.plan((SYSTEM, TEXT, THINK, IMAGE, TEXT, THINK, IMAGE))
    assert look_again.text_counts(5) == (10, 5)
    assert look_again.text_counts(0) == (1, 1)  # images are not trained
    assert tasks.plan((TEXT, THINK, IMAGE, ANSWER)).text_counts(5) == (5, 1)
    counts = {name: tasks.plan(task.events).text_counts(5) for name, task in tasks.TASKS.items()}
    assert counts == {"rt2i": (5,), "t2i": (), "srr": (5,), "ti2i": (5,), "ti2t": (1, 1)}


def test_the_reflection_request_has_a_blank_before_its_line_break_in_generate_alone():
    (trained,) = tasks.TASKS["srr"].texts
    assert "the correct image.\nReflect on" in trained
    assert "the correct image. \nReflect on" in tasks.GENERATE_REFLECTION_REQUEST
    assert trained.replace("\n", " \n") == tasks.GENERATE_REFLECTION_REQUEST


def test_only_tasks_that_say_so_have_a_format_reward():
    rewarded = {name for name, task in tasks.TASKS.items() if task.format_reward}
    assert rewarded == {"rt2i", "ti2i", "ti2t"}


def test_fixed_prompts_are_those_of_the_pretrained_weights():
    assert tasks.THINK_SYSTEM_PROMPT.startswith(
        "You should first think about the planning process in the mind and then generate the "
        "image. \nThe planning process is enclosed"
    )
    assert tasks.THINK_SYSTEM_PROMPT.endswith("<think> planning process here </think> image here")
