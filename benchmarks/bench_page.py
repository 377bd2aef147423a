"""The page and the verdicts that bench.py's numbers come to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_rows import HIGHER_IS_BETTER, OURS, Goal, Row

REASONS = "## Reasons"
MOVED = 5  # losses can be compared where training moved them by so many times the tolerance
KL_AT_START = 1e-2  # nats: policy and reference are the same weights
NO_REASONS = f"""{REASONS}

Written by hand, kept by the script: why a target is missed, by the row's name.
"""
INTRODUCTION = """# Performance

Made by `make bench` (`python benchmarks/bench.py --out docs/performance.md`): do not edit above "Reasons". The numbers lie in
performance.json.

Both sides of a row do the same work on the same machine, in turn, in processes of their own: same weights (Llama shapes with
random weights), same token rows in the same order, same optimiser batch, AdamW with the same settings, constant learning
rate, same precision. align is the product: `align.trainer.train` with its defaults and its allocator. TRL at its best has
no gradient checkpointing, rows packed to 1,024 tokens (SFT, one pack a step, which is about what the other side has in a
step), reference log-probabilities computed before (DPO), and the allocator told to keep its memory. Tokens are real tokens,
never padding. Times are wall time of whole steps after the first ones, ratios are taken turn by turn: median (range).
Memory is the peak of the process. Targets were set on a processor with bfloat16 matrix units.

The losses of every step agree within the tolerance (relative), or the script fails; the rows are drawn so that training moves
the loss, and a loss that did not move counts as a failure. Packing puts other rows into a step, so packed losses cannot be
compared. PPO draws its responses by different generators on each side: there the KL of the first iteration must be 0.
"""


@dataclass(frozen=True)
class Verdict:
    """A goal with what was measured: median and range, and the same by processor time where that was kept."""

    goal: Goal
    ours: str
    peer: str
    values: Sequence[float]
    by_processor: Sequence[float]

    @property
    def value(self) -> float:
        """Median over the turns."""
        return statistics.median(self.values)

    def reaches(self, bound: float) -> bool:
        """Whether the median is at the bound or on its good side."""
        return self.value >= bound if self.goal.measure in HIGHER_IS_BETTER else self.value <= bound

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.reaches(self.goal.target)


@dataclass(frozen=True)
class Agreement:
    """largest: relative difference of two losses of one step, by side. problems: what must not be."""

    largest: Mapping[str, float]
    problems: Sequence[str]


def agreement(row: Row, measured: Mapping[str, Any]) -> Agreement:
    """Whether the sides that train on the same rows have the same losses, step by step and turn by turn."""
    sides = measured["sides"]
    if row.kind == "ppo":
        kls = {side: abs(results[0]["kl"][0]) for side, results in sides.items()}
        problems = [f"{row.key}: {side} starts at KL {kl:.2g}" for side, kl in kls.items() if kl > KL_AT_START]
        return Agreement({}, problems)
    if row.kind != "train":
        return Agreement({}, [])
    tolerance, largest, problems = row.tolerance[measured["precision"]], {}, []
    for side in row.sides:
        if not side.compared or side.name not in sides:
            continue
        losses = [result["losses"] for result in sides[side.name]]
        if losses[0][0] - losses[0][-1] < MOVED * tolerance * losses[0][0]:
            problems.append(f"{row.key}: {side.name} hardly learnt, {losses[0][0]:.4f} to {losses[0][-1]:.4f}")
        if side.name == OURS:
            continue
        pairs = [
            (a, b)
            for one, other in zip(sides[OURS], losses, strict=False)
            for a, b in zip(one["losses"], other, strict=False)
        ]
        largest[side.name] = max(abs(a - b) / abs(b) for a, b in pairs)
        if not largest[side.name] <= tolerance:
            problems.append(f"{row.key}: {side.name} is off by {largest[side.name]:.2g}, more than {tolerance:g}")
    return Agreement(largest, problems)


def verdicts(row: Row, measured: Mapping[str, Any]) -> list[Verdict]:
    """Every goal of a row."""
    return [_verdict(goal, measured["sides"]) for goal in row.goals]


def _verdict(goal: Goal, sides: Mapping[str, Any]) -> Verdict:
    ours, peer = sides[goal.ours], sides.get(goal.peer, [])
    pairs = list(zip(ours, peer, strict=False))
    match goal.measure:
        case "seconds":
            values = [one["seconds"] for one in ours]
            return Verdict(goal, f"{statistics.median(values):.2f} s", "", values, [])
        case "overhead":
            values = [one["total_seconds"] / other["total_seconds"] - 1 for one, other in pairs]
            return Verdict(goal, _median(ours, "total_seconds", " s"), _median(peer, "total_seconds", " s"), values, [])
        case "share":
            values = [one["flops"] / one["seconds"] / other["flops_per_second"] for one, other in pairs]
            speed = statistics.median(one["flops"] / one["seconds"] for one in ours)
            limit = statistics.median(other["flops_per_second"] for other in peer)
            return Verdict(goal, f"{speed / 1e12:.3f} TFLOP/s", f"{limit / 1e12:.3f} TFLOP/s", values, [])
        case "memory":
            values = [one["peak_mib"] / other["peak_mib"] for one, other in pairs]
            return Verdict(goal, _median(ours, "peak_mib", " MiB"), _median(peer, "peak_mib", " MiB"), values, [])
    extra = goal.measure == "speed with reference"
    values = [_cost(other, "seconds") / _cost(one, "seconds", reference=extra) for one, other in pairs]
    processor = [
        _cost(other, "processor_seconds") / _cost(one, "processor_seconds", reference=extra) for one, other in pairs
    ]
    return Verdict(goal, _speed(ours, reference=extra), _speed(peer), values, processor)


def _speed(results: Sequence[Mapping[str, Any]], *, reference: bool = False) -> str:
    """Units a second; of whole iterations, seconds."""
    cost = statistics.median(_cost(result, "seconds", reference=reference) for result in results)
    return f"{cost:.2f} s" if results[0]["units"] == 1 else f"{1 / cost:,.4g}/s"


def _cost(result: Mapping[str, Any], clock: str, *, reference: bool = False) -> float:
    """Seconds per unit; reference: with the share of the timed steps in what the reference took."""
    seconds: float = result[clock]
    if reference:
        share = result["steps"] / len(result["losses"])
        seconds += result["reference_seconds"] * share
    return seconds / float(result["units"])


def page(rows: Sequence[Row], measured: Mapping[str, Any], before: str) -> str:
    """The page as Markdown. before: the page that was there; its hand-written reasons stay."""
    there = [row for row in rows if row.key in measured]
    found = before.find(REASONS)
    reasons = before[found:] if found >= 0 else NO_REASONS
    lines = [INTRODUCTION, *_machine_lines([measured[row.key] for row in there]), ""]
    lines += [
        "| | align | peer | ratio | by processor time | target (stretch) | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in there:
        lines += [_goal_line(row, verdict, reasons) for verdict in verdicts(row, measured[row.key])]
    for row in there:
        lines += ["", *_detail_lines(row, measured[row.key])]
    missing = [row.key for row in rows if row.key not in measured]
    if missing:
        lines += ["", "Not measured yet: " + ", ".join(missing) + "."]
    return "\n".join(lines) + "\n\n" + reasons.rstrip() + "\n"


def _machine_lines(measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was measured on; several lines where rows were measured on several machines or with other versions."""
    yield from {_place(one): None for one in measured}
    devices = {one["device"] for one in measured} - {""}
    yield "Nothing was measured on a GPU." if devices <= {"cpu"} else f"Devices: {', '.join(sorted(devices))}."
    if any(one["precision"] == "float32" for one in measured):
        yield (
            "Rows in float32: that is what align chooses there (no bfloat16 in the processor, or a narrow model), and the peers "
            "were told the same; TRL's own default is bfloat16 autocast everywhere, which stands as a row of its own in SFT."
        )


def _place(one: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
    return f"{one['date']}: {one['machine']}; {versions}."


def _goal_line(row: Row, verdict: Verdict, reasons: str) -> str:
    goal = verdict.goal
    show = _percent if goal.measure in ("overhead", "share") else _plain
    if verdict.met:
        word = "met, stretch too" if verdict.reaches(goal.stretch) else "met"
    else:
        word = f"**missed**: [{row.key}](#reasons)" if row.key in reasons else "**missed**, reason not found yet"
    ratio = f"{show(verdict.value)} ({show(min(verdict.values))} to {show(max(verdict.values))})"
    processor = show(statistics.median(verdict.by_processor)) if verdict.by_processor else ""
    bounds = f"{show(goal.target)} ({show(goal.stretch)})"
    return f"| {goal.what} | {verdict.ours} | {verdict.peer} | {ratio} | {processor} | {bounds} | {word} |"


def _detail_lines(row: Row, measured: Mapping[str, Any]) -> Iterator[str]:
    """One table for each row: what every side did."""
    sides, found = measured["sides"], agreement(row, measured)
    yield f"## {row.title}"
    yield ""
    what = [f"{name} {value}" for name, value in row.work.items() if value not in (None, False)]
    facts = [measured["precision"], f"{measured['threads']} thread(s)", f"{measured['turns']} turns", measured["date"]]
    yield ", ".join([*what, *(fact for fact in facts if fact)]) + "."
    if found.largest:
        yield f"Tolerance of the losses: {row.tolerance[measured['precision']]:g}."
    yield ""
    yield "| | wall s | processor s | units/s | peak MiB | first loss, last loss | largest difference |"
    yield "|---|---|---|---|---|---|---|"
    for side, results in sides.items():
        clock = "seconds" if "seconds" in results[0] else "total_seconds"
        units = [one["units"] / one[clock] for one in results if "units" in one]
        losses = results[0].get("losses") or []
        ends = f"{losses[0]:.5f}, {losses[-1]:.5f}" if losses else _ppo_losses(results[0])
        off = f"{found.largest[side]:.1e}" if side in found.largest else ""
        cells = [_median(results, clock), _median(results, "processor_seconds")]
        cells += [f"{statistics.median(units):,.4g}" if units else "", _median(results, "peak_mib"), ends, off]
        yield f"| {side} | " + " | ".join(cells) + " |"


def _ppo_losses(result: Mapping[str, Any]) -> str:
    if "policy_loss" not in result:
        return ""
    return f"policy {result['policy_loss'][0]:.4f}, value {result['value_loss'][0]:.4f}, KL {result['kl'][0]:.1e}"


def _median(results: Sequence[Mapping[str, Any]], name: str, unit: str = "") -> str:
    values = [one[name] for one in results if name in one]
    if not values:
        return ""
    value = statistics.median(values)
    return (f"{value:,.0f}" if value >= 100 else f"{value:.2f}") + unit


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if abs(value) >= 0.1 else f"{value:.1%}"
