"""Summarizes the study of refinement: means, paired gains and tables from shares of facts."""

import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np

from alphagrpo_jax.studies import bootstrap
from alphagrpo_jax.studies.bootstrap import Gain

UNTRAINED = "untrained"
KINDS = ("all", "plain", "implied")
JUDGED = ("first", "refined", "own_first", "own_refined", "edit")  # in a run's file
COLUMNS = (
    "first", "refined", "gain", "improved", "kept", "spoilt", "own_first", "own_refined",
    "own_gain", "own_improved", "own_spoilt", "edit",
)  # fmt: skip
COMPARED = ("refined", "improved", "spoilt", "own_gain", "own_spoilt", "edit")


def outcomes(judged: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """Computes `COLUMNS` of every record from shares of facts; "edit" of every edit.

    Args:
      judged: shares of facts that hold, by name of `JUDGED`.
    Returns:
      float64[N] per column.
    """
    columns = {}
    for prefix in ("", "own_"):
        before, after = (np.array(judged[f"{prefix}{name}"]) for name in ("first", "refined"))
        first, refined = ((shares == 1.0).astype(np.float64) for shares in (before, after))
        signs = {"improved": after > before, "kept": after == before, "spoilt": after < before}
        values = {"first": first, "refined": refined, "gain": refined - first}
        values |= {name: holds.astype(np.float64) for name, holds in signs.items()}
        columns |= {f"{prefix}{name}": column for name, column in values.items()}
    columns["edit"] = (np.array(judged["edit"]) == 1.0).astype(np.float64)
    return {name: columns[name] for name in COLUMNS}


def prompt_group(record: Mapping) -> str:
    """Returns a prompt's group, as in `bootstrap`: "implied" or "plain/TYPE"."""
    return "implied" if record["kind"] == "implied" else f"plain/{record['type']}"


def means(values: Mapping[str, np.ndarray], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Computes means of `outcomes` by kind of prompt, weighted as in `bootstrap`.

    Edits are no prompts of a group: "edit" stands under "all" alone.
    """
    by_kind: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for name, column in values.items():
        shares = (
            {"all": float(column.mean())} if name == "edit" else bootstrap.shares(column, groups)
        )
        for kind in by_kind.keys() & shares.keys():
            by_kind[kind][name] = round(shares[kind], 4)
    return by_kind


def gains(
    after: Sequence[Mapping[str, np.ndarray]],
    before: Sequence[Mapping[str, np.ndarray]],
    records: Sequence[Mapping],
    edits: Sequence[Mapping],
) -> dict[str, dict[str, Gain]]:
    """Computes paired differences of the columns `COMPARED`, by kind of prompt.

    Args:
      after: `outcomes` of R runs.
      before: `outcomes` of R runs, which are paired in order; or of another number of runs, whose
        mean is compared with every run of `after`.
      records: of the prompts.
      edits: records of the edits; edits with equal facts are one cluster.
    """
    groups = [prompt_group(record) for record in records]
    clusters = [bootstrap.cluster(record) for record in records]
    by_kind: dict[str, dict[str, Gain]] = {kind: {} for kind in KINDS}
    for name in COMPARED:
        new, old = (np.stack([run[name] for run in runs]) for runs in (after, before))
        if len(old) != len(new):
            old = old.mean(axis=0)
        paired = new - old
        if name == "edit":
            by_kind["all"][name] = _edit_gain(paired, edits)
            continue
        column_gains = bootstrap.gains(paired, np.zeros(len(records)), groups, clusters)
        for kind in KINDS:
            by_kind[kind][name] = column_gains[kind]
    return by_kind


def _edit_gain(paired: np.ndarray, edits: Sequence[Mapping]) -> Gain:
    rng = np.random.default_rng(0)
    runs = bootstrap.sample_runs(rng, len(paired))
    facts = [json.dumps(record["facts"], sort_keys=True) for record in edits]
    return Gain(float(paired.mean()), bootstrap.resample(paired, facts, runs, rng))


def summary(
    policies: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    records: Sequence[Mapping],
    edits: Sequence[Mapping],
) -> dict:
    """Computes means of every run, and gains between policies with 95 % intervals.

    Args:
      policies: name -> `outcomes` of each of its runs; `UNTRAINED` is among them.
      records: of the prompts.
      edits: of the edits.
    """
    groups = [prompt_group(record) for record in records]
    run_means = {name: [means(run, groups) for run in runs] for name, runs in policies.items()}
    columns = {
        name: {
            kind: {column: [run[kind][column] for run in runs] for column in runs[0][kind]}
            for kind in KINDS
        }
        for name, runs in run_means.items()
    }
    names = [*(name for name in policies if name != UNTRAINED), UNTRAINED]
    compared = {}
    for new, old in itertools.combinations(names, 2):
        by_kind = gains(policies[new], policies[old], records, edits)
        compared[f"{new} - {old}"] = {
            kind: {
                name: {"gain": round(gain.value, 4), "interval_95": gain.interval}
                for name, gain in kind_gains.items()
            }
            for kind, kind_gains in by_kind.items()
        }
    counts = {name: groups.count(name) for name in dict.fromkeys(groups)}
    return {"prompts": counts, "edits": len(edits), "policies": columns, "gains": compared}


def table(summary_: Mapping) -> str:
    """Formats a summary as two Markdown tables; a mean of several runs is followed by the runs."""
    lines = ["| policy | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for policy, kinds in summary_["policies"].items():
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
    for pair, kinds in summary_["gains"].items():
        for kind, columns in kinds.items():
            cells = [_gain(columns[name]) if name in columns else "" for name in COMPARED]
            lines.append(f"| {pair}, {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    runs = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{runs}"


def _gain(gain: Mapping) -> str:
    low, high = gain["interval_95"]
    return f"{gain['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
