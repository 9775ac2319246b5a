"""Trains the small verifier of the shapes world on a CPU.

    python -m alphagrpo_jax.shapes.pretraining.train_verifier --out DIR --threads 1

Took 73 minutes for the shipped model, on a machine busy with other trainings.

Two stages, both supervised by the rendered scenes: the vision tower learns dense labels of patches,
then all of the model answers questions packed behind a shared image prefix, while auxiliary losses
tie words to the image: patch features point to word embeddings, a noun's state in a middle layer
predicts the cells it names, and the last token's state one layer later predicts those of both
nouns. The same command resumes a run from DIR/checkpoint.pt (exit code 75: stopped after a save).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.files import replacing
from alphagrpo_jax.runtime.paths import existing_file
from alphagrpo_jax.runtime.stopping import StopFlag
from alphagrpo_jax.shapes import questions, scenes
from alphagrpo_jax.shapes.pretraining import resumable, verifier_data, verifier_model
from alphagrpo_jax.shapes.pretraining import verifier_packed as packed
from alphagrpo_jax.shapes.pretraining.muon import make_optimizers
from alphagrpo_jax.shapes.pretraining.verifier_data import BatchEncoder, VerifierBatch
from alphagrpo_jax.shapes.specs import COLORS

STAGES = ("vision", "joint")
IMAGES = {"vision": 32, "joint": 12}  # per step
QUESTIONS = 16  # per image
RATE_EVERY = 8  # joint steps per step that asks for ratings
PEAK_LR = {"vision": 4e-3, "joint": 3e-3}
WARMUP = 50  # steps
VALIDATION_IMAGES, CALIBRATION_IMAGES = 64, 500
VALIDATION_SEED = 10_000  # added to the run's seed


def labeled_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean binary cross-entropy where `targets` is not NaN; 0 if all are NaN."""
    labeled = ~targets.isnan()
    total = F.binary_cross_entropy_with_logits(logits[labeled], targets[labeled], reduction="sum")
    return total / labeled.sum().clamp(min=1)


def patch_loss(outputs: Tensor, batch: VerifierBatch) -> Tensor:
    """Computes the loss of each patch's shape, color, background, cell, faults and change.

    Args:
      outputs: float32[N, 36, sum(PATCH_OUTPUTS)].
      batch: the labels.
    """
    *classes, faults, change = outputs.split(verifier_data.PATCH_OUTPUTS, -1)
    row, column = verifier_data.patch_cells()
    labels = (batch.shape, batch.color, batch.background[:, None], row[None], column[None])
    loss = outputs.new_zeros(())
    for logits, targets in zip(classes, labels, strict=True):
        targets = targets.expand(outputs.shape[:2])
        loss = loss + F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = loss + labeled_bce(faults, batch.faults)
    # Where the location of a fault is unknown, only its presence in the image is learned.
    anywhere = torch.logsumexp(faults, 1) - math.log(faults.shape[1])
    loss = loss + labeled_bce(anywhere, 1 - batch.quality)
    return loss + F.smooth_l1_loss(change.squeeze(-1), batch.change)


class ClassTokens:
    """Token ids of the shape and color words that patches are aligned with."""

    def __init__(self, encoder: BatchEncoder):
        ids = encoder.tokenizer.convert_tokens_to_ids
        self.shapes, self.colors = ids(list(scenes.SHAPES)), ids(list(COLORS))


def align_loss(
    model: LlavaForConditionalGeneration,
    probes: packed.Probes,
    words: ClassTokens,
    patches: Tensor,
    batch: VerifierBatch,
) -> Tensor:
    """Computes the loss that aligns patch features with their shape's and color's embeddings."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    table = F.normalize(embeddings, dim=-1)
    features = F.normalize(patches, dim=-1).flatten(0, 1)
    nothing = F.normalize(probes.nothing, dim=-1)
    loss = patches.new_zeros(())
    for index, (ids, labels) in enumerate(
        ((words.shapes, batch.shape), (words.colors, batch.color))
    ):
        classes = torch.cat([table[ids], nothing[index : index + 1]])
        loss = loss + F.cross_entropy(10 * features @ classes.T, labels.flatten())
    return loss


def losses(
    model: LlavaForConditionalGeneration,
    probes: packed.Probes,
    words: ClassTokens,
    prefix: Tensor,
    batch: VerifierBatch,
    stage: str,
) -> dict[str, Tensor]:
    """Computes all losses of a stage by name; training minimizes their sum."""
    patches = packed.patch_features(model, batch.pixels)
    result = {
        "patch": patch_loss(probes.patch(patches), batch),
        "align": 0.5 * align_loss(model, probes, words, patches, batch),
    }
    if stage == "vision":
        return result
    start = packed.embed_prefix(model, prefix, patches)
    states = packed.question_states(model, start, batch.tokens, batch.ends)
    cells = probes.cells(states.grounded[batch.nouns])
    result["cells"] = 3 * labeled_bce(cells, batch.cells)
    subjects = probes.subjects(packed.last_states(states.gathered, batch.ends))
    result["subjects"] = 3 * labeled_bce(subjects.view(batch.subjects.shape), batch.subjects)
    logits = model.lm_head(packed.last_states(states.final, batch.ends))
    result["answer"] = 2 * F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    result["patch"] = 0.5 * result["patch"]
    return result


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration,
    encoder: BatchEncoder,
    prefix: Tensor,
    seed: int,
    images: int,
) -> tuple[list[str], Tensor, Tensor]:
    """Answers questions about fresh training images.

    Returns:
      Each question's type, its truth bool[K], and its logit of yes less that of no, float32[K].
    """
    rng = np.random.default_rng(seed)
    yes, no = (encoder.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    types, truths, margins = [], [], []
    for _ in range(images):
        example = verifier_data.sample_labeled_image(rng)
        triples = verifier_data.questions_about(example, rng, QUESTIONS)
        batch = encoder.batch([example], [triples])
        start = packed.embed_prefix(model, prefix, packed.patch_features(model, batch.pixels))
        states = packed.question_states(model, start, batch.tokens, batch.ends)
        logits = model.lm_head(packed.last_states(states.final, batch.ends))[0]
        margins.append(logits[:, yes] - logits[:, no])
        types += [type_ for *_, type_ in triples]
        truths += [answer == "yes" for _, answer, _ in triples]
    return types, torch.tensor(truths), torch.cat(margins)


def accuracies(types: list[str], truths: Tensor, margins: Tensor) -> dict[str, float]:
    """Computes the share of correct answers by question type, from the output of `validate`."""
    correct = (margins > 0) == truths
    type_of = np.array(types)
    return {t: correct[type_of == t].float().mean().item() for t in questions.TYPES if t in types}


def temperature(truths: Tensor, margins: Tensor) -> float:
    """Finds the divisor of logits, of a grid over 0.5 to 4, that makes the truths most likely."""
    grid = torch.logspace(-1, 2, 301, base=2.0)
    losses = torch.stack(
        [F.binary_cross_entropy_with_logits(margins / t, truths.float()) for t in grid]
    )
    return grid[losses.argmin()].item()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Computes linear warm-up, then constant, then linear decay to zero over the second half."""
    return peak * min(1, (step + 1) / WARMUP, 2 * (steps - step) / steps)


class Trainer:
    """Model, probes, optimizers and position of a run; saved and restored as one file."""

    def __init__(
        self,
        out: Path,
        seed: int,
        steps: dict[str, int],
        joint_lr: float = PEAK_LR["joint"],
        start: Path | None = None,
    ):
        torch.manual_seed(seed)
        self.out, self.seed, self.steps, self.start = out, seed, steps, start
        self.options = {"seed": seed, "joint_lr": joint_lr, "start": str(start)}
        self.peak = PEAK_LR | {"joint": joint_lr}
        self.model, self.processor = verifier_model.build_verifier(verifier_data.vocabulary())
        self.probes = packed.Probes(verifier_model.WIDTH, sum(verifier_data.PATCH_OUTPUTS))
        self.encoder = BatchEncoder(self.processor.tokenizer)
        self.prefixes = {
            "ask": self.encoder.prefix(AUDIT_INSTRUCTION),
            "rate": self.encoder.prefix(RATE_INSTRUCTION),
        }
        self.words = ClassTokens(self.encoder)
        self.stage, self.step = STAGES[0], 0
        self.seconds = 0.0  # of training, over all sittings
        self.optimizers = make_optimizers([self.model, self.probes], PEAK_LR[self.stage])

    def state(self) -> dict:
        """Returns everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "position": (self.stage, self.step),
            "options": self.options,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        with replacing(self.out / "checkpoint.pt") as file:
            torch.save(self.state(), file)

    def restore(self) -> bool:
        """Restores the folder's checkpoint; returns False if there is none.

        Raises:
          InputError: the checkpoint is of a run with other options; the steps of a stage that has
            not begun may differ.
        """
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        stage, _ = state["position"]
        begun = STAGES[: STAGES.index(stage) + 1]
        saved = state.get("options", {}) | {f"{s}_steps": state["steps"][s] for s in begun}
        current = self.options | {f"{s}_steps": self.steps[s] for s in begun}
        resumable.check_options(saved, current, self.out)
        self.model.load_state_dict(state["model"])
        self.probes.load_state_dict(state["probes"])
        self.stage, self.step = state["position"]
        self.seconds = state.get("seconds", 0.0)  # absent from older checkpoints
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        return True

    @property
    def asks_for_ratings(self) -> bool:
        """Returns True if this step asks for ratings instead of yes or no."""
        return self.stage == "joint" and self.step % RATE_EVERY == RATE_EVERY - 1

    def sample_batch(self) -> VerifierBatch:
        """Samples the batch of the current position; it depends on seed and position alone."""
        rng = np.random.default_rng([self.seed, STAGES.index(self.stage), self.step])
        examples = [verifier_data.sample_labeled_image(rng) for _ in range(IMAGES[self.stage])]
        if self.stage == "vision":
            return self.encoder.batch(examples, [[] for _ in examples])
        if self.asks_for_ratings:
            triples = [verifier_data.ratings_about(example, rng) for example in examples]
        else:
            triples = [
                verifier_data.questions_about(example, rng, QUESTIONS) for example in examples
            ]
        return self.encoder.batch(examples, triples)

    def begin(self) -> None:
        """Loads the final weights of the run in `start`, if set, and skips to the joint stage.

        Raises:
          MissingFileError: the folder has no checkpoint.
        """
        if self.start is None:
            return
        path = existing_file(self.start / "checkpoint.pt", "--start names an earlier --out")
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.probes.load_state_dict(state["probes"])
        self.stage = "joint"
        self.optimizers = make_optimizers([self.model, self.probes], self.peak["joint"])

    def validate(self, images: int) -> tuple[list[str], Tensor, Tensor]:
        """Runs `validate` on images that are equal in all calls."""
        seed = self.seed + VALIDATION_SEED
        return validate(self.model, self.encoder, self.prefixes["ask"], seed, images)

    def update(self) -> dict[str, float]:
        """Takes one optimizer step; returns the losses by name.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        prefix = self.prefixes["rate" if self.asks_for_ratings else "ask"]
        batch = self.sample_batch()
        terms = losses(self.model, self.probes, self.words, prefix, batch, self.stage)
        total = sum(terms.values(), start=torch.zeros(()))
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss is {total} at step {self.step} of {self.stage}")
        total.backward()
        values = [*self.model.parameters(), *self.probes.parameters()]
        nn.utils.clip_grad_norm_(values, 1.0)
        lr = learning_rate(self.step, self.steps[self.stage], self.peak[self.stage])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: term.item() for name, term in terms.items()}


def train(
    trainer: Trainer,
    *,
    save_every: int = 100,
    report_every: int = 200,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Runs the remaining steps of all stages; returns the exit code.

    Args:
      trainer: the run.
      save_every, report_every: steps.
      stopped: called after every step; when it returns True, the run saves and ends.
    """
    start_time = time.monotonic() - trainer.seconds
    for stage in STAGES[STAGES.index(trainer.stage) :]:
        if stage != trainer.stage:
            trainer.stage, trainer.step = stage, 0
            trainer.optimizers = make_optimizers(
                [trainer.model, trainer.probes], trainer.peak[stage]
            )
        bar = tqdm(total=trainer.steps[stage], initial=trainer.step, desc=stage, mininterval=5.0)
        while trainer.step < trainer.steps[stage]:
            terms = trainer.update()
            trainer.seconds = time.monotonic() - start_time
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            if trainer.step % save_every == 0:
                trainer.save()
            if stage == "joint" and trainer.step % report_every == 0:
                shares = accuracies(*trainer.validate(VALIDATION_IMAGES))
                words = " ".join(f"{name} {share:.3f}" for name, share in shares.items())
                tqdm.write(f"step {trainer.step} {words}")
            if stopped():
                break
        bar.close()
        trainer.save()
        if stopped():
            return cli.STOPPED
    return cli.DONE


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=cli.SEED, default=0)
    parser.add_argument("--vision-steps", type=cli.COUNT, default=1500)
    parser.add_argument("--joint-steps", type=cli.COUNT, default=5000)
    parser.add_argument("--joint-lr", type=float, default=PEAK_LR["joint"])
    parser.add_argument("--start", type=Path, help="folder of a run to go on from, questions only")
    parser.add_argument("--threads", type=cli.COUNT, default=2)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains, calibrates and saves; returns the exit code."""
    stop = StopFlag()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    steps = {"vision": options.vision_steps, "joint": options.joint_steps}
    trainer = Trainer(options.out, options.seed, steps, options.joint_lr, options.start)
    if trainer.restore():
        tqdm.write(f"resuming {trainer.stage} at step {trainer.step}")
    else:
        trainer.begin()
    code = train(trainer, stopped=lambda: stop.requested)
    spent = f"{trainer.seconds:.0f} seconds of training"
    if code == cli.STOPPED:
        tqdm.write(f"stopped after {spent}; the same command continues", file=sys.stderr)
        return code
    divisor = temperature(*trainer.validate(CALIBRATION_IMAGES)[1:])
    with torch.no_grad():
        trainer.model.lm_head.weight.div_(divisor)
    tqdm.write(f"logits divided by {divisor:.3f}, so that probabilities are calibrated")
    tqdm.write(f"{spent} in all")
    trainer.model.save_pretrained(options.out)
    trainer.processor.save_pretrained(options.out)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
