"""What training on self-reflective refinement changes, by the exact checker on held-out prompts.

    python -m alphagrpo_jax.studies.srr --out docs/study \\
      --run srr=runs/study/srr0 --run srr=runs/study/srr1 --run srr_without=runs/study/srr_without0

Every policy repairs the same first images, which the untrained one drew without thinking, under
the same noise, whatever its verdict on them: `first` is the same in every row on purpose. Beside
that every policy repairs the images that it draws itself (`own_...`). `first`, `refined`: shares of
fully right images, `gain` their difference; `improved`, `kept`, `spoilt`: shares of refinements by
the share of facts that hold; `edit`: share of held-out edits after which every fact holds, though
no edit is trained. All policies are sampled by the default configuration's settings.

Differences between policies are paired by prompt and noise, and between runs of two names by their
order; intervals are those of `study`, over runs and clusters of prompts. Plain types weigh alike,
and in `all` plain and implied prompts do.

One JSON file per run in OUT, which is not measured again, and summary_refine.json; two tables are
printed.
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from alphagrpo_jax import config_checks, inference, tasks
from alphagrpo_jax.inference import Policy, run_task
from alphagrpo_jax.runtime import checkpoint, cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.images import from_data_url
from alphagrpo_jax.shapes import checker, image_records
from alphagrpo_jax.studies import measure
from alphagrpo_jax.studies import rt2i as study_lib
from alphagrpo_jax.training import run_folder

SEED = 47
PER_PLAIN_TYPE, IMPLIED, EDITS = 300, 800, 400
UNTRAINED = "untrained"
SUMMARY = "summary_refine.json"
KINDS = ("all", "plain", "implied")
JUDGED = ("first", "refined", "own_first", "own_refined", "edit")  # in a run's file
COLUMNS = (
    "first", "refined", "gain", "improved", "kept", "spoilt", "own_first", "own_refined",
    "own_gain", "own_improved", "own_spoilt", "edit",
)  # fmt: skip
COMPARED = ("refined", "improved", "spoilt", "own_gain", "own_spoilt", "edit")


def fact_shares(images: np.ndarray, records: Sequence[Mapping]) -> np.ndarray:
    """Share of each record's facts that hold in its image, float64[N]."""
    return np.array(
        [
            np.mean(list(checker.facts(image, record["facts"]).values()))
            for image, record in zip(images, records, strict=True)
        ]
    )


def initial_images(policy: Policy, records: Sequence[Mapping]) -> np.ndarray:
    """One image per record without thinking, uint8[N, 48, 48, 3]."""
    asked = [record["prompt"] for record in records]
    return run_task(policy, tasks.TASKS["t2i"], asked, seed=SEED, temperature=0.0).images


def judge(
    policy: Policy,
    records: Sequence[Mapping],
    first: np.ndarray,
    edits: Sequence[Mapping],
    *,
    drew_first: bool,
) -> dict[str, list[float]]:
    """Shares of facts that hold, per record: `JUDGED`, those of "edit" per edit.

    Args:
      policy: who repairs and edits, with texts sampled at temperature 1.
      records: what the first images were drawn for.
      first: uint8[N, 48, 48, 3], the images that all policies repair.
      edits: records with images.
      drew_first: whether `first` is this policy's own.
    """
    asked = [record["prompt"] for record in records]

    def refined(images: np.ndarray) -> np.ndarray:
        made = run_task(policy, tasks.TASKS["srr"], asked, images, seed=SEED + 1, temperature=1.0)
        return fact_shares(made.images, records)

    found = {"first": fact_shares(first, records), "refined": refined(first)}
    if drew_first:
        found |= {f"own_{name}": values for name, values in found.items()}
    else:
        own = initial_images(policy, records)
        found |= {"own_first": fact_shares(own, records), "own_refined": refined(own)}
    sources = np.stack([np.asarray(from_data_url(record["image"])) for record in edits])
    wishes = [record["prompt"] for record in edits]
    edited = run_task(policy, tasks.TASKS["ti2i"], wishes, sources, seed=SEED + 2, temperature=1.0)
    found["edit"] = fact_shares(edited.images, edits)
    return {name: np.round(values, 6).tolist() for name, values in found.items()}


def outcomes(judged: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """`COLUMNS` of every record, float64[N], from shares of facts; "edit" of every edit."""
    found = {}
    for own in ("", "own_"):
        before, after = (np.array(judged[f"{own}{name}"]) for name in ("first", "refined"))
        whole = [(values == 1.0).astype(np.float64) for values in (before, after)]
        signs = {"improved": after > before, "kept": after == before, "spoilt": after < before}
        values = {"first": whole[0], "refined": whole[1], "gain": whole[1] - whole[0]}
        values |= {name: held.astype(np.float64) for name, held in signs.items()}
        found |= {f"{own}{name}": each for name, each in values.items()}
    found["edit"] = (np.array(judged["edit"]) == 1.0).astype(np.float64)
    return {name: found[name] for name in COLUMNS}


def prompt_group(record: Mapping) -> str:
    """Of `study`: "implied" or "plain/TYPE"."""
    return "implied" if record["kind"] == "implied" else f"plain/{record['type']}"


def means(values: Mapping[str, np.ndarray], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means of `outcomes` by kind of prompt, weighed as in `study`; "edit" under "all" alone."""
    found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for name, each in values.items():
        shares = {"all": float(each.mean())} if name == "edit" else study_lib.shares(each, groups)
        for kind in found.keys() & shares.keys():
            found[kind][name] = round(shares[kind], 4)
    return found


def gains(
    after: Sequence[Mapping[str, np.ndarray]],
    before: Sequence[Mapping[str, np.ndarray]],
    records: Sequence[Mapping],
    edits: Sequence[Mapping],
) -> dict[str, dict[str, study_lib.Gain]]:
    """Paired differences of the measures `COMPARED`, by kind of prompt, with bootstrap samples.

    Args:
      after: `outcomes` of R runs.
      before: those of as many runs, which are paired in order; or of another number of runs, whose
        mean is compared with each.
      records: of the prompts.
      edits: records of the edits; each meaning is a cluster.
    """
    groups = [prompt_group(record) for record in records]
    clusters = [study_lib.cluster(record) for record in records]
    found: dict[str, dict[str, study_lib.Gain]] = {kind: {} for kind in KINDS}
    for name in COMPARED:
        new, old = (np.stack([run[name] for run in runs]) for runs in (after, before))
        if len(old) != len(new):
            old = old.mean(axis=0)
        paired = new - old
        if name != "edit":
            nothing = np.zeros(len(records))
            own = study_lib.gains(paired, nothing, groups, clusters)
            for kind in KINDS:
                found[kind][name] = own[kind]
            continue
        rng, count = np.random.default_rng(0), len(paired)
        runs = rng.multinomial(count, np.full(count, 1 / count), study_lib.RESAMPLES)
        meanings = [json.dumps(record["facts"], sort_keys=True) for record in edits]
        resampled = study_lib.resample(paired, meanings, runs, rng)
        found["all"][name] = study_lib.Gain(float(paired.mean()), resampled)
    return found


def summary(
    policies: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    records: Sequence[Mapping],
    edits: Sequence[Mapping],
) -> dict:
    """Means of every run by policy and kind, and gains between policies with 95 % intervals.

    Args:
      policies: name -> `outcomes` of each of its runs; `UNTRAINED` is among them.
      records: of the prompts.
      edits: of the edits.
    """
    groups = [prompt_group(record) for record in records]
    each = {name: [means(run, groups) for run in runs] for name, runs in policies.items()}
    shown = {
        name: {
            kind: {column: [run[kind][column] for run in runs] for column in runs[0][kind]}
            for kind in KINDS
        }
        for name, runs in each.items()
    }
    names = [*(name for name in policies if name != UNTRAINED), UNTRAINED]
    compared = {}
    for new, old in itertools.combinations(names, 2):
        found = gains(policies[new], policies[old], records, edits)
        compared[f"{new} - {old}"] = {
            kind: {
                name: {"gain": round(gain.value, 4), "interval_95": gain.interval}
                for name, gain in own.items()
            }
            for kind, own in found.items()
        }
    counts = {name: groups.count(name) for name in dict.fromkeys(groups)}
    return {"prompts": counts, "edits": len(edits), "policies": shown, "gains": compared}


def table(found: Mapping) -> str:
    """A summary as two Markdown tables; single runs stand behind a mean of several."""
    lines = ["| policy | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for policy, kinds in found["policies"].items():
        for kind, columns in kinds.items():
            cells = [_mean(columns.get(name, ())) for name in COLUMNS]
            lines.append(f"| {policy}, {kind} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "`first` are the untrained policy's images, the same for all; `own_...` starts from each "
        "policy's own.",
        "",
        "| difference (95 % interval) | " + " | ".join(COMPARED) + " |",
        "|---" * (len(COMPARED) + 1) + "|",
    ]
    for pair, kinds in found["gains"].items():
        for kind, columns in kinds.items():
            cells = [_gain(columns[name]) if name in columns else "" for name in COMPARED]
            lines.append(f"| {pair}, {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    each = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{each}"


def _gain(gain: Mapping) -> str:
    low, high = gain["interval_95"]
    return f"{gain['gain']:+.3f} ({low:+.3f} to {high:+.3f})"


def load_or_judge(
    path: pathlib.Path,
    policy: Policy,
    records: list,
    first: np.ndarray,
    edits: list,
    *,
    drew_first: bool,
) -> dict:
    """What is in `path`, or is judged and written there; see `judge`.

    Raises:
      ValueError: the file is damaged, or about other weights, images, prompts, or checks.
    """
    about = {
        "weights": weights_digest(policy),
        "first": hashlib.sha256(first.tobytes()).hexdigest(),
        "prompts": _digest(records),
        "edits": _digest(edits),
        "checker": checker.RULES,
    }
    if path.exists():
        try:
            found = json.loads(path.read_text())
            got = {name: found["about"][name] for name in about}
            lengths = [len(found[name]) for name in JUDGED]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds no judgements of this study ({error!r}); delete it to measure again"
            ) from error
        expected = [len(edits) if name == "edit" else len(records) for name in JUDGED]
        other = [name for name in about if got[name] != about[name]]
        if other or lengths != expected:
            raise InputError(
                f"{path} is about other {', '.join(other) or 'numbers of records'}; choose another "
                "--out, or delete it to measure again"
            )
        return found
    judged = judge(policy, records, first, edits, drew_first=drew_first)
    replace_text(path, json.dumps({"about": about} | judged) + "\n")
    return judged


def _digest(records: Sequence[Mapping]) -> str:
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def weights_digest(policy: Policy) -> str:
    """sha256 over a policy's weights and adapters."""
    params = policy.params
    adapters = {} if params.lora is None else {"lora": params.lora}
    return checkpoint.digest({"base": params.base} | adapters, {"scale": params.lora_scale})


def study(options: argparse.Namespace) -> dict:
    """Measures what is missing, and returns the summary.

    Raises:
      InputError: an unfinished run, or see `load_or_judge`.
    """
    for _, folder in options.run:
        if not run_folder.is_finished(folder):
            raise InputError(
                f"the run in {folder} is not finished: it has no {run_folder.DONE_FILE}; continue "
                "it to its end first"
            )
    config = config_checks.read_config()
    base = inference.from_config(config)
    records = measure.heldout_records(options.per_type, options.implied)
    edits = image_records.records("edit", "heldout", options.edits, seed=SEED)
    options.out.mkdir(parents=True, exist_ok=True)
    first = initial_images(base, records)
    policies: dict[str, list[dict[str, np.ndarray]]] = {}
    for name, folder in [(UNTRAINED, None), *options.run]:
        policy = base if folder is None else inference.from_run(folder)._replace(config=config)
        label = name if folder is None else f"{name}_{folder.resolve().name}"
        path = options.out / f"refine_{label}.json"
        found = load_or_judge(path, policy, records, first, edits, drew_first=folder is None)
        policies.setdefault(name, []).append(outcomes(found))
    return summary(policies, records, edits)


def _run(text: str) -> tuple[str, pathlib.Path]:
    name, _, folder = text.partition("=")
    if not name or not folder or name == UNTRAINED:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=FOLDER")
    return name, pathlib.Path(folder)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="folder of the raw results")
    add("--run", type=_run, action="append", default=[], help="NAME=FOLDER of a finished run")
    add("--per-type", type=int, default=PER_PLAIN_TYPE, help="prompts of every plain type")
    add("--implied", type=int, default=IMPLIED, help="implied prompts")
    add("--edits", type=int, default=EDITS)
    options = parser.parse_args(arguments)
    if min(options.per_type, options.implied, options.edits) < 1:
        parser.error("--per-type, --implied and --edits must be at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Measures what is missing, writes the summary and prints its table."""
    found = study(options)
    replace_text(options.out / SUMMARY, json.dumps(found, indent=2) + "\n")
    sys.stdout.write(table(found) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
