"""Reads held-out results out of rows of metrics: the newest, and what training changed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Result(NamedTuple):
    """A held-out result of an evaluation, and what it is made of."""

    name: str  # "exact" or "reward"
    value: float
    by: dict[str, float]  # task -> value in mixed runs, else kind of prompt -> value; or nothing


def breakdown(row: Mapping[str, Any]) -> list[Result]:
    """Returns the held-out results of a row of metrics; none if it has no evaluation."""
    results = []
    for name, key in (("exact", "eval/exact_all"), ("reward", "eval/reward/mean")):
        if row.get(key) is None:
            continue
        end = f"/{key}"
        by = {
            k.removesuffix(end): row[k]
            for k in sorted(row)
            if k.endswith(end) and row[k] is not None
        }
        if not by and name == "exact":
            by = {kind: row[f"{key}/{kind}"] for kind in sorted(exact_kinds(row))}
        results.append(Result(name, row[key], by))
    return results


def exact_kinds(row: Mapping[str, Any]) -> list[str]:
    """Returns the kinds of prompts whose exact score a row of metrics has."""
    prefix = "eval/exact_all/"
    kinds = [key.removeprefix(prefix) for key in row if key.startswith(prefix)]
    return [kind for kind in kinds if "/" not in kind and row[prefix + kind] is not None]


class Change(NamedTuple):
    """A held-out result at the first evaluation of a run and at its newest."""

    name: str  # as in `Result`
    group: str  # a task or a kind of prompt; empty: of all
    before: float
    after: float


def changes(rows: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Returns what training changed, by held-out result; none before the second evaluation."""
    evaluated = [row for row in rows if breakdown(row)]
    if len(evaluated) < 2:
        return []
    first = {result.name: result for result in breakdown(evaluated[0])}
    compared = []
    for name, value, by in breakdown(evaluated[-1]):
        if name in first:
            compared.append(Change(name, "", first[name].value, value))
            groups = [group for group in by if group in first[name].by]
            compared += [Change(name, group, first[name].by[group], by[group]) for group in groups]
    return compared
