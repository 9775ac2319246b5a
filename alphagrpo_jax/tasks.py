"""Declares every task: the list of its events and the context of each step.

A trajectory is a list of events over growing contexts. `plan` turns the list into a static graph
of *nodes* (an event's tokens as computed in one particular context) by the rules of AlphaGRPO
(arXiv 2605.12495) and BAGEL's inference:

| event                             | gen     | cfg_text            | cfg_img   |
|-----------------------------------|---------|---------------------|-----------|
| system prompt (think mode)        | + text  | unchanged           | + text    |
| input text                        | + text  | := gen before it    | + text    |
| input image                       | + image | := gen after it     | unchanged |
| input image, to be understood     | + ViT   | := gen after it     | unchanged |
| generated think text              | + text  | unchanged           | unchanged |
| generated answer, more follows    | + text  | + text              | + text    |
| generated image, more follows     | + image | := gen after it     | unchanged |

An image is its VAE tokens, then its ViT tokens; one that is only to be understood has ViT tokens
alone.
Adding a task is adding an entry to `TASKS`.
"""

import dataclasses
from collections.abc import Sequence

THINK_SYSTEM_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process "
    "here </think> image here"
)
ANSWER_SYSTEM_PROMPT = (
    "You should first think about the reasoning process in the mind and then provide the user with "
    "the answer. \nThe reasoning process is enclosed within <think> </think> tags, i.e. <think> "
    "reasoning process here </think> answer here"
)
# Of `generate`, as BAGEL's weights and AlphaGRPO's evaluation have it.
GENERATE_REFLECTION_REQUEST = (
    "The user requires to generate image of `{prompt}`. You tried to generate an image based on "
    "the user's request, but you failed to create the correct image. \nReflect on what went wrong "
    "and write down the editing instruction that will help you do better and refine the image to "
    "meet user's request based on your own reflection."
)
# Of training, as AlphaGRPO's has it: without the blank before the line break.
REFLECTION_REQUEST = GENERATE_REFLECTION_REQUEST.replace(" \n", "\n")

SYSTEM, TEXT = "system", "text"  # inputs
GIVEN_IMAGE, SEEN_IMAGE = "given_image", "seen_image"  # to be changed; to be understood only
THINK, ANSWER, IMAGE = "think", "answer", "image"  # steps of the policy
GENERATED = (THINK, ANSWER, IMAGE)
BATCHED = (TEXT, GIVEN_IMAGE, SEEN_IMAGE)  # inputs that differ from prompt to prompt
GIVEN = (GIVEN_IMAGE, SEEN_IMAGE)
IMAGES = (*GIVEN, IMAGE)
SOURCES = (("",), ("record", "drawn"))  # `Task.image` without and with a given image
LEVELS = ("shared", "prompt", "trajectory")
EVENT_LEVELS = dict.fromkeys(GENERATED, "trajectory") | {
    SYSTEM: "shared",
    TEXT: "prompt",
    GIVEN_IMAGE: "prompt",
    SEEN_IMAGE: "prompt",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its list of events, the source of its inputs, and its reward."""

    name: str
    events: tuple[str, ...]
    system_prompt: str = ""
    # One per text input, filled in from the record's fields.
    texts: tuple[str, ...] = ("{prompt}",)
    # Source of input images: "record", the record's "image"; "drawn", failed images of the policy.
    image: str = ""
    data: str = "prompts"  # which pair of files: see `config.DataOptions.pair`
    reward: str = "image"  # DVReward of the last image, or "answer": the last text is right
    format_reward: bool = False  # True: the think text's form is part of the reward
    refines: bool = False  # True: rewards are compared with that of the input image

    def __post_init__(self) -> None:
        """Checks that texts and image source fit the events; `plan` checks the list itself.

        Raises:
          ValueError: another number of texts than of text inputs; more than one input image; or a
            source of input images that is unknown, missing, or has no image to fill.
        """
        texts = self.events.count(TEXT)
        input_images = sum(event in GIVEN for event in self.events)
        if len(self.texts) != texts:
            raise ValueError(
                f"task {self.name!r} has {len(self.texts)} texts for {texts} events {TEXT!r}; give "
                "one template for each"
            )
        if input_images > 1:
            raise ValueError(
                f"task {self.name!r} is given {input_images} images; a record has one, so at most "
                f"one event may be among {GIVEN}"
            )
        if self.image not in SOURCES[input_images]:
            raise ValueError(
                f"task {self.name!r} has image={self.image!r} and {input_images} events among "
                f"{GIVEN}; expected one of {SOURCES[input_images]}"
            )

    @property
    def draws(self) -> bool:
        """True if the last step is an image."""
        return self.events[-1] == IMAGE

    @property
    def text_kinds(self) -> tuple[str, ...]:
        """Returns THINK or ANSWER for each text step."""
        return tuple(event for event in self.events if event in (THINK, ANSWER))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns the kinds of the inputs that differ from prompt to prompt, in order."""
        return tuple(event for event in self.events if event in BATCHED)


TASKS = {
    task.name: task
    for task in (
        Task("rt2i", (SYSTEM, TEXT, THINK, IMAGE), THINK_SYSTEM_PROMPT, format_reward=True),
        Task("t2i", (TEXT, IMAGE)),
        Task(
            "srr",
            (SYSTEM, GIVEN_IMAGE, TEXT, THINK, IMAGE),
            THINK_SYSTEM_PROMPT,
            texts=(REFLECTION_REQUEST,),
            image="drawn",
            refines=True,
        ),
        Task(
            "ti2i",
            (SYSTEM, GIVEN_IMAGE, TEXT, THINK, IMAGE),
            THINK_SYSTEM_PROMPT,
            image="record",
            data="edits",
            format_reward=True,
        ),
        Task(
            "ti2t",
            (SYSTEM, SEEN_IMAGE, TEXT, THINK, ANSWER),
            ANSWER_SYSTEM_PROMPT,
            image="record",
            data="answers",
            reward="answer",
            format_reward=True,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Node:
    """The tokens of one event, computed in the context of the nodes `before`."""

    event: int  # index into the task's events
    kind: str
    before: tuple[int, ...]
    level: str  # rows: "shared" (one for all), "prompt" (one each) or "trajectory"


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A step of the policy and the nodes of its three contexts."""

    kind: str
    event: int
    index: int  # counts text steps and image steps separately
    gen: tuple[int, ...]
    cfg_text: tuple[int, ...]
    cfg_img: tuple[int, ...]
    node: int | None  # the node that holds its tokens afterwards; None if nothing follows
    edits: bool  # True: its context holds an image, and guidance is that of edits


@dataclasses.dataclass(frozen=True)
class Plan:
    """A task as a static graph; hashable, so it may be a static argument of jit."""

    events: tuple[str, ...]
    nodes: tuple[Node, ...]
    steps: tuple[PlannedStep, ...]

    @property
    def shared(self) -> tuple[int, ...]:
        """Returns the indices of the nodes with one row."""
        return tuple(index for index, node in enumerate(self.nodes) if node.level == "shared")

    @property
    def text_steps(self) -> tuple[PlannedStep, ...]:
        """Returns the steps that write text."""
        return tuple(step for step in self.steps if step.kind != IMAGE)

    @property
    def image_steps(self) -> tuple[PlannedStep, ...]:
        """Returns the steps that generate images."""
        return tuple(step for step in self.steps if step.kind == IMAGE)

    def text_counts(self, window: int) -> tuple[int, ...]:
        """Counts for each text step the trained steps of all images that follow it.

        So many steps a text's loss weighs as much as (AlphaGRPO, arXiv 2605.12495, as released).

        Args:
          window: trained steps per image; 0 where images are not trained.
        Returns:
          One count per text step, 1 where no trained step follows.
        """
        return tuple(
            max(1, window * sum(step.kind == IMAGE for step in self.steps[number:]))
            for number, text_step in enumerate(self.steps)
            if text_step.kind != IMAGE
        )


def plan(events: tuple[str, ...]) -> Plan:
    """Plans the contexts of every step of a list of events, by the table above.

    Args:
      events: kinds in order.
    Raises:
      ValueError: an unknown kind, or a list that does not end with a generated event.
    """
    if not events or events[-1] not in GENERATED:
        raise ValueError(f"got events {events}; expected the last one to be among {GENERATED}")
    nodes: list[Node] = []
    steps: list[PlannedStep] = []
    gen, cfg_text, cfg_img = tuple[int, ...](), tuple[int, ...](), tuple[int, ...]()

    def extended(context: tuple[int, ...], event: int) -> tuple[int, ...]:
        # A node has as many rows as the most numerous of its event and its context.
        event_level = LEVELS.index(EVENT_LEVELS[events[event]])
        level = max([event_level, *(LEVELS.index(nodes[index].level) for index in context)])
        node = Node(event, events[event], context, LEVELS[level])
        if node not in nodes:
            nodes.append(node)
        return (*context, nodes.index(node))

    for event, kind in enumerate(events):
        if kind not in EVENT_LEVELS:
            raise ValueError(f"got event {kind!r} in {events}; known: {tuple(EVENT_LEVELS)}")
        before = (gen, cfg_text, cfg_img)
        last = event == len(events) - 1
        if kind == SYSTEM:
            gen, cfg_img = extended(gen, event), extended(cfg_img, event)
        elif kind == TEXT:
            gen, cfg_text, cfg_img = extended(gen, event), gen, extended(cfg_img, event)
        elif kind == THINK:
            gen = gen if last else extended(gen, event)
        elif kind == ANSWER:
            if not last:
                gen, cfg_text, cfg_img = (extended(context, event) for context in before)
        elif not last:  # an image: input, to be understood, or generated
            gen = extended(gen, event)
            cfg_text = gen
        if kind in GENERATED:
            index = sum((step.kind == IMAGE) == (kind == IMAGE) for step in steps)
            edits = any(nodes[index].kind in IMAGES for index in before[0])
            node = None if last else gen[-1]
            steps.append(PlannedStep(kind, event, index, *before, node, edits))
    return Plan(tuple(events), tuple(nodes), tuple(steps))


def think_texts(task: Task, texts: Sequence[list[str]]) -> list[list[str]]:
    """Selects the think steps' texts from those of all text steps."""
    steps = zip(texts, task.text_kinds, strict=True)
    return [step_texts for step_texts, kind in steps if kind == THINK]
