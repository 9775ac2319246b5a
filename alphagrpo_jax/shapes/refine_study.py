"""What training on self-reflective refinement changes, by the exact checker on held-out prompts.

    python -m alphagrpo_jax.shapes.refine_study --out docs/study \\
      --run srr=runs/study/srr0 --run srr=runs/study/srr1 --run srr_without=runs/study/srr_without

Every policy repairs the same first images, which the untrained one drew without thinking, under
the same noise, whatever its verdict on them. `improved`, `kept`, `spoilt`: shares of refinements by
the share of facts that hold; `first`, `refined`: shares of fully right images; `edit`: share of
held-out edits after which every fact holds, though no edit is trained. All policies are sampled by
the default configuration's settings. One JSON file per run in OUT, which is not measured again; the
table is printed.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from alphagrpo_jax import tasks, trained
from alphagrpo_jax.inference import perform
from alphagrpo_jax.refinement import outcomes
from alphagrpo_jax.runtime import checkpoint
from alphagrpo_jax.runtime.images import from_data_url
from alphagrpo_jax.runtime.metrics import replace_text
from alphagrpo_jax.shapes import checker, image_records, measure
from alphagrpo_jax.trained import Trained

SEED = 47
UNTRAINED = "untrained"
COLUMNS = ("first", "refined", "gain", "improved", "kept", "spoilt", "edit")


def share_right(images: np.ndarray, records: Sequence[Mapping]) -> np.ndarray:
    """Share of each record's facts that hold in its image, float64[N]."""
    return np.array(
        [
            np.mean(list(checker.facts(image, record["facts"]).values()))
            for image, record in zip(images, records, strict=True)
        ]
    )


def first_images(policy: Trained, records: Sequence[Mapping]) -> np.ndarray:
    """One image per record without thinking, uint8[N, 48, 48, 3]."""
    asked = [record["prompt"] for record in records]
    return perform(policy, tasks.TASKS["t2i"], asked, seed=SEED, temperature=0.0).images


def judge(
    policy: Trained, records: Sequence[Mapping], first: np.ndarray, edits: Sequence[Mapping]
) -> dict[str, list[float]]:
    """Shares of facts that hold, per record: `refined`, and `edit` of the edits.

    Args:
      policy: who repairs and edits, with texts sampled at temperature 1.
      records: what the first images were drawn for.
      first: uint8[N, 48, 48, 3].
      edits: records with images.
    """
    asked = [record["prompt"] for record in records]
    made = perform(policy, tasks.TASKS["srr"], asked, first, seed=SEED + 1, temperature=1.0)
    sources = np.stack([_image(record) for record in edits])
    wishes = [record["prompt"] for record in edits]
    edited = perform(policy, tasks.TASKS["ti2i"], wishes, sources, seed=SEED + 2, temperature=1.0)
    found = {
        "refined": share_right(made.images, records),
        "edit": share_right(edited.images, edits),
    }
    return {name: np.round(values, 6).tolist() for name, values in found.items()}


def _image(record: Mapping) -> np.ndarray:
    return np.asarray(from_data_url(record["image"]))


def figures(first: Sequence[float], judged: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The table's numbers, from shares of facts per record."""
    before, after = np.array(first), np.array(judged["refined"])
    whole = [float(np.mean(values == 1.0)) for values in (before, after)]
    found = {"first": whole[0], "refined": whole[1], "gain": whole[1] - whole[0]}
    edit = float(np.mean(np.array(judged["edit"]) == 1.0))
    return found | outcomes(before, after) | {"edit": edit}


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: each name's mean over its runs, and single runs where there are several."""
    lines = ["| policy | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in rows.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            each = f" ({', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{each}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(
    path: pathlib.Path, policy: Trained, records: list, first: np.ndarray, edits: list
) -> dict:
    """What is in `path`, or is measured and written there.

    Raises:
      ValueError: the file is about other weights or other prompts.
    """
    about = {"weights": weights_digest(policy), "prompts": len(records), "edits": len(edits)}
    if path.exists():
        found = json.loads(path.read_text())
        got = found.get("about")
        if got != about:
            raise ValueError(f"{path} is about {got}, expected {about}; delete it to measure again")
        return found
    judged = judge(policy, records, first, edits)
    judged["first"] = np.round(share_right(first, records), 6).tolist()
    judged["kind"] = [record["kind"] for record in records]
    replace_text(path, json.dumps({"about": about} | judged) + "\n")
    return judged


def weights_digest(policy: Trained) -> str:
    """sha256 over a policy's weights and adapters."""
    params = policy.params
    adapters = {} if params.lora is None else {"lora": params.lora}
    return checkpoint.digest({"base": params.base} | adapters, {"scale": params.lora_scale})


def study(options: argparse.Namespace) -> str:
    """Measures what is missing, and returns the table."""
    config = trained.read_config()
    base = trained.from_config(config)
    records = measure.heldout_records(options.per_type, options.implied)
    edits = image_records.records("edit", "heldout", options.edits, seed=SEED)
    options.out.mkdir(parents=True, exist_ok=True)
    first = first_images(base, records)
    rows: dict[str, list[dict]] = {}
    for name, folder in [(UNTRAINED, None), *options.run]:
        policy = base if folder is None else trained.from_run(folder)._replace(config=config)
        label = name if folder is None else f"{name}_{folder.resolve().name}"
        found = measured(options.out / f"refine_{label}.json", policy, records, first, edits)
        for kind in ("", "plain", "implied"):
            at = [i for i, own in enumerate(found["kind"]) if kind in ("", own)]
            part = {key: [found[key][i] for i in at] for key in ("first", "refined")}
            own = figures(part["first"], part | {"edit": found["edit"]})
            rows.setdefault(f"{name}{kind and f', {kind}'}", []).append(own)
    return table(rows)


def _run(text: str) -> tuple[str, pathlib.Path]:
    name, _, folder = text.partition("=")
    if not name or not folder or name == UNTRAINED:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=FOLDER")
    return name, pathlib.Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="folder of the raw results")
    add("--run", type=_run, action="append", default=[], help="NAME=FOLDER of a finished run")
    add("--per_type", type=int, default=80, help="prompts of every plain type")
    add("--implied", type=int, default=400, help="implied prompts")
    add("--edits", type=int, default=400)
    options = parser.parse_args(arguments)
    if min(options.per_type, options.implied, options.edits) < 1:
        parser.error("--per_type, --implied and --edits must be at least 1")
    try:
        text = study(options)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"refine_study: {error}\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
