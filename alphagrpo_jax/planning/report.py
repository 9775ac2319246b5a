"""Writes a plan: tables for people, JSON for programs, and the verdict."""

import math
from collections.abc import Sequence
from typing import Any

from alphagrpo_jax.config import Config
from alphagrpo_jax.planning.chips import GPU_FRACTION, GPU_FRACTION_VARIABLE, Chip
from alphagrpo_jax.planning.fit import (
    StageNeeds,
    Suggestion,
    iteration_seconds,
    roofline,
    speed,
    without_evaluation,
)
from alphagrpo_jax.planning.stages import EVALUATION, INITIAL, ROLLOUT, UPDATE
from alphagrpo_jax.planning.targets import Target

GB = 1e9
# Kinds of memory with a column of their own; the others are added up in the last.
COLUMNS = ("weights", "LoRA", "optimizer", "contexts", "gradient", "results", "temporaries")


def worst_of(needs: Sequence[StageNeeds]) -> StageNeeds:
    """Returns the stage that needs the most memory; those that a compiler refused come first."""
    return max(needs, key=lambda entry: (entry.compiled.too_large > 0, entry.peak))


def fits(needs: Sequence[StageNeeds], chip: Chip) -> bool:
    """Tells whether no stage needs more than a chip has, and none was refused."""
    worst = worst_of(needs)
    return not worst.compiled.too_large and worst.peak <= chip.memory


def verdict(needs: Sequence[StageNeeds], chip: Chip) -> str:
    """Returns the last line of a plan."""
    if fits(needs, chip):
        return "fits: yes"
    worst, limit = worst_of(needs), f"{chip.memory / GB:.1f} GB per chip"
    if math.isinf(worst.peak):
        return f"fits: no ({worst.stage.name} needs more than {limit})"
    return f"fits: no ({worst.stage.name} needs {worst.peak / GB:.1f} of {limit})"


def sources(target: Target) -> dict[str, str]:
    """Says of every kind of number whether a compiler measured it or it is an estimate."""
    if target.exact:
        how = f"measured by {target.compiler}"
        return {
            "arrays": "exact, from shapes and shardings",
            "temporaries": how,
            "collectives": how + ", loops counted as often as they run",
            "memory_traffic": how + ", loops counted as often as they run",
            "flops": "counted in the traced program (matrix products), spread evenly",
            "seconds": "estimated: the largest of three rooflines",
        }
    how = "estimated by XLA for CPUs"
    return {
        "arrays": "exact, from shapes and shardings",
        "temporaries": how + " with all in float32: an upper bound",
        "collectives": how + ": kinds and number may differ, float32 where GPUs send bfloat16",
        "memory_traffic": "estimated: arguments once per call, and per token in write_text",
        "flops": "counted in the traced program (matrix products), spread evenly",
        "seconds": "estimated: the largest of three rooflines",
    }


def memory_table(needs: Sequence[StageNeeds]) -> str:
    """Formats bytes per device by stage and kind, in GB."""
    header = ["GB per chip", *COLUMNS, "other", "peak"]
    rows = []
    for entry in needs:
        kinds = entry.bytes_by_kind
        kinds["LoRA"] = kinds.get("LoRA", kinds.pop("trained weights", 0.0))
        known = [kinds.pop(name, 0.0) for name in COLUMNS]
        sizes = [*known, sum(kinds.values())]
        refused = " (refused)" if entry.compiled.too_large else ""
        rows.append(
            [entry.stage.name, *(f"{size / GB:.2f}" for size in sizes), f"{entry.peak / GB:.2f}"]
        )
        rows[-1][-1] += refused
    return _aligned([header, *rows])


def work_table(needs: Sequence[StageNeeds], chip: Chip) -> str:
    """Formats work and least time per call of each stage."""
    header = [
        "per call", "calls", "TFLOP", "GB moved", "collectives", "MB sent", "least ms", "bound by",
        "compile s",
    ]  # fmt: skip
    rows = []
    for entry in needs:
        compiled, least = entry.compiled, roofline(entry.compiled, chip)
        count = sum(number for number, _ in compiled.collectives.values())
        rows.append(
            [
                entry.stage.name,
                f"{entry.stage.calls:g}",
                f"{compiled.flops / 1e12:.2f}",
                f"{compiled.memory_traffic / GB:.1f}",
                f"{count:.0f}",
                f"{compiled.collective_bytes / 1e6:.2f}",
                f"{least.seconds * 1e3:.1f}",
                least.bound,
                f"{compiled.compile_seconds:.0f}" + (" cached" if compiled.cached else ""),
            ]
        )
    return _aligned([header, *rows])


def collective_lines(needs: Sequence[StageNeeds]) -> list[str]:
    """Names the collectives of each stage by kind, and what a token costs."""
    lines = []
    for entry in needs:
        kinds = [
            f"{kind} {number:.0f} x, {size / 1e6:.2f} MB"
            for kind, (number, size) in sorted(entry.compiled.collectives.items())
        ]
        if kinds:
            lines.append(f"collectives of {entry.stage.name}, per call: {'; '.join(kinds)}")
        if is_text(entry):
            sent = entry.compiled.step_collective_bytes / 1e6
            moved = entry.compiled.step_memory_traffic / GB
            lines.append(
                f"{entry.stage.name}, per token and device: {sent:.4f} MB through collectives, "
                f"{moved:.2f} GB of memory traffic"
            )
    return lines


def is_text(entry: StageNeeds) -> bool:
    """Tells whether a stage writes text, token by token."""
    return entry.stage.name.endswith("write_text")


def minimum_lines(needs: Sequence[StageNeeds], config: Config, *, exact: bool) -> list[str]:
    """Holds stages against the least work of the model's arithmetic.

    Args:
      needs: of all stages.
      config: the run's.
      exact: False leaves out bytes, which are then no compiler's.
    """
    lines = []
    for entry in needs:
        name, least = entry.stage.name, entry.stage.minimum
        if entry.flops_ratio is not None and not is_text(entry):
            remat = f" with model.remat={config.model.remat}" if entry.stage.part == UPDATE else ""
            lines.append(
                f"{name}, per call and device: {entry.compiled.flops / 1e12:.1f} TFLOP, "
                f"{entry.flops_ratio:.2f} x the {least.flops / 1e12:.1f} of the arithmetic{remat}"
            )
        if exact and entry.token_bytes_ratio is not None:
            moved = entry.compiled.step_memory_traffic / GB
            lines.append(
                f"{name}, per token and device: {moved:.2f} GB moved, "
                f"{entry.token_bytes_ratio:.2f} x the {least.token_bytes / GB:.2f} that must be "
                f"read (weights {least.token_weights / GB:.2f}, caches "
                f"{least.token_caches / GB:.2f})"
            )
    return lines


def speed_line(needs: Sequence[StageNeeds], target: Target, images: float) -> str:
    """Says how many images a second are drawn, judged and trained on at the roofline."""
    at_roofline = speed(needs, target.chip, images)
    if at_roofline is None:
        return "images per second: not known, as a function was refused"
    rates = (at_roofline.images_per_second / count for count in (1, len(target.devices)))
    return (
        "images per second at the roofline: {:.3g}, {:.3g} per chip; ".format(*rates)
        + f"share of the arithmetic's roof: {at_roofline.share:.0%} (the model's arithmetic alone "
        f"takes {at_roofline.arithmetic_seconds:.2f} s at the chips' peak)"
    )


def time_lines(needs: Sequence[StageNeeds], chip: Chip) -> list[str]:
    """Says how long an iteration takes at the roofline, and an evaluation."""
    parts = iteration_seconds(needs, chip)
    shares = [
        f"{name} {parts[name]:.2f} s" for name in (INITIAL, ROLLOUT, UPDATE) if parts.get(name)
    ]
    lines = [
        f"an iteration at the roofline: {without_evaluation(parts):.2f} s ({', '.join(shares)}); "
        "verifiers, hosts and all that is not at the roofline come on top"
    ]
    if EVALUATION in parts:
        lines.append(f"an evaluation at the roofline: {parts[EVALUATION]:.1f} s")
    return lines


def memory_line(chip: Chip) -> str:
    """Says how much memory of a chip counts, and why."""
    usable = f"{chip.memory / GB:.1f} GB of a {chip.name} are counted on"
    if chip.platform == "tpu":
        return f"{usable}: what its compiler allows a program"
    return (
        f"{usable}: {GPU_FRACTION:.0%} of the data sheet's; set {GPU_FRACTION_VARIABLE}="
        f"{GPU_FRACTION} (JAX takes 0.75 by itself)"
    )


def suggestion_lines(suggestion: Suggestion | None, chip: Chip) -> list[str]:
    """Says what to change."""
    if suggestion is None:
        return ["no field is known to make it fit: take chips with more memory, or more of them"]
    flags = " ".join(f"--config.{name}={value}" for name, value in suggestion.changes.items())
    size = f"{suggestion.peak / GB:.1f} of {chip.memory / GB:.1f} GB"
    if suggestion.fits:
        return [f"to make it fit: {flags} (estimated from sizes: {size}); plan again with them"]
    return [f"the most that fields change: {flags} (estimated: {size}); take larger chips or more"]


def as_json(
    needs: Sequence[StageNeeds],
    target: Target,
    mesh: dict[str, int],
    notes: Sequence[str],
    images: float,
) -> dict[str, Any]:
    """Returns the plan as JSON's types; bytes per device, seconds, stages by name."""
    chip = target.chip
    parts = iteration_seconds(needs, chip)
    at_roofline = speed(needs, chip, images)
    return {
        "target": target.name,
        "compiler": target.compiler,
        "devices": len(target.devices),
        "mesh": mesh,
        "chip": {
            "name": chip.name,
            "flops_per_second": chip.flops,
            "memory_bytes": chip.memory,
            "memory_bytes_per_second": chip.memory_rate,
            "link_bytes_per_second": chip.link_rate,
            "network_bytes_per_second": chip.network_rate,
            "source": chip.source,
        },
        "notes": list(notes),
        "sources": sources(target),
        "stages": {
            entry.stage.name: _stage_json(entry, chip, exact=target.exact) for entry in needs
        },
        "iteration_seconds": {"all": without_evaluation(parts), **parts},
        "images": images,
        "images_per_second": at_roofline and at_roofline.images_per_second,
        "images_per_second_per_chip": at_roofline
        and at_roofline.images_per_second / len(target.devices),
        "arithmetic_seconds": at_roofline and at_roofline.arithmetic_seconds,
        "arithmetic_share": at_roofline and at_roofline.share,
        "peak_bytes": _finite(worst_of(needs).peak),
        "peak_stage": worst_of(needs).stage.name,
        "fits": fits(needs, chip),
        "verdict": verdict(needs, chip),
    }


def _stage_json(entry: StageNeeds, chip: Chip, *, exact: bool) -> dict[str, Any]:
    least_work = entry.stage.minimum
    compiled, least = entry.compiled, roofline(entry.compiled, chip)
    row = {
        "part": entry.stage.part,
        "calls": entry.stage.calls,
        "bytes": {kind: _finite(size) for kind, size in entry.bytes_by_kind.items()},
        "peak_bytes": _finite(entry.peak),
        "refused_bytes": _finite(compiled.too_large),
        "flops": compiled.flops,
        "least_flops": least_work.flops or None,
        "flops_ratio": entry.flops_ratio,
        "model_flops": least_work.model_flops,
        "memory_traffic_bytes": compiled.memory_traffic,
        "collectives": {
            kind: {"count": number, "bytes": size}
            for kind, (number, size) in compiled.collectives.items()
        },
        "collective_bytes": compiled.collective_bytes,
        "network_bytes": compiled.network_bytes,
        "roofline_seconds": least.seconds,
        "bound_by": least.bound,
        "compile_seconds": compiled.compile_seconds,
        "cached": compiled.cached,
    }
    if is_text(entry):
        row["collective_bytes_per_token"] = compiled.step_collective_bytes
        row["memory_traffic_bytes_per_token"] = compiled.step_memory_traffic
        row["least_weight_bytes_per_token"] = least_work.token_weights
        row["least_cache_bytes_per_token"] = least_work.token_caches
        row["token_bytes_ratio"] = entry.token_bytes_ratio if exact else None
    return row


def _finite(size: float) -> float | None:
    """Returns a size for JSON, which has no infinity: None where a compiler gave no number."""
    return size if math.isfinite(size) else None


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
