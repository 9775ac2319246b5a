"""Prints how judges of many families are asked, how exactly and how fast.

    python tests/judge_table.py [FAMILY ...]
    python tests/judge_table.py --large qwen3_vl qwen3_5    # 400 image tokens; Qwen-VL alone

Each family is tiny and random (`judge_families`). Per family, of 10 questions about one image: the
way, the largest difference of P(yes) from plain transformers asked one question at a time, and the
seconds of that divided by those of the verifier. PYTHONPATH chooses the revision that is measured.
"""

import inspect
import logging
import sys
import time
import warnings
from collections.abc import Callable

import judge_families
import numpy as np
import torch

from alphagrpo_jax.rewards.verifiers import hf
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION

REPEATS = 5
LARGE_SIDE = 560
NO_SYSTEM_TURN = ("mllama",)


def ask_plainly(name: str, image: np.ndarray) -> list[float]:
    """Asks the questions one at a time, as transformers' manual has it."""
    judge = judge_families.FAMILIES[name]()
    return [
        judge_families.plain_p_yes(
            judge_families.plain_logits(
                judge, image, question, AUDIT_INSTRUCTION, system=name not in NO_SYSTEM_TURN
            ),
            judge.processor.tokenizer,
        )
        for question in judge_families.QUESTIONS
    ]


def seconds(function: Callable[[], object]) -> float:
    """Returns the processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def plain_passes(name: str, image: np.ndarray) -> None:
    """Runs what is timed of `ask_plainly`: processor and model, without reading the answers."""
    judge = judge_families.FAMILIES[name]()
    for question in judge_families.QUESTIONS:
        judge_families.plain_logits(
            judge, image, question, AUDIT_INSTRUCTION, system=name not in NO_SYSTEM_TURN
        )


def row(name: str, image: np.ndarray) -> tuple[str, str, str]:
    """Returns way, difference and speed of one family, or the error in place of the way."""
    judge = judge_families.FAMILIES[name]()
    expected = ask_plainly(name, image)
    hf.load = lambda *_: judge
    options = {}
    if "min_mass" in inspect.signature(hf.HFVerifier).parameters:
        options["min_mass"] = 0.0
    else:  # of older revisions
        hf.MIN_MASS = 0.0
    try:
        verifier = hf.HFVerifier(name, **options)
        answers = verifier.answer(image, judge_families.QUESTIONS)
    except Exception as error:  # what a family raises is what this table shows
        return f"{type(error).__name__}: {error}"[:60], "-", "-"
    pairs = zip(answers, expected, strict=True)
    apart = max(abs(answer.p_yes - p_yes) for answer, p_yes in pairs)
    together, singly = [], []
    for _ in range(REPEATS):
        together.append(seconds(lambda: verifier.answer(image, judge_families.QUESTIONS)))
        singly.append(seconds(lambda: plain_passes(name, image)))
    speed = np.median(singly) / np.median(together)
    return verifier.passes.way, f"{apart:.1g}", f"{speed:.1f}"


def main() -> None:
    """Prints a table in Markdown."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*judge_families.FAMILIES]
    image = judge_families.picture()
    if names[0] == "--large":
        names, image = names[1:], judge_families.picture(LARGE_SIDE, LARGE_SIDE)
        for name in names:
            processor = judge_families.FAMILIES[name]().processor.image_processor
            pixels = 2 * LARGE_SIDE**2  # GLM-V counts two frames
            processor.size = type(processor.size)(shortest_edge=56 * 56, longest_edge=pixels)
    sys.stdout.write("| family | way | apart | times as fast |\n|---|---|---|---|\n")
    for name in names:
        sys.stdout.write(f"| {name} | {' | '.join(row(name, image))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
