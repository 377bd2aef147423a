"""Signs that a policy games its reward or collapses, looked for after every round and every held-out measurement.

Over-optimisation is Goodhart's law at work (Gao 2023): the reward that is trained on goes on rising while a judge, or a
reward that is only watched, falls. A guard is warned of once, and again when it had been quiet in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from align.recipe.ppo_settings import Guard, GuardSettings

LENGTH_STEP = 0.1  # by how much the length correlation must exceed the first round's to be the policy's doing


@dataclass(frozen=True)
class Alarm:
    """One guard at one round: the value, the limit that it crossed, and the sentence for people."""

    round: int
    guard: Guard
    value: float
    limit: float
    said: str


@dataclass
class Guards:
    """Watches one run. first: numbers of the first round; exam: those of the first held-out measurement."""

    settings: GuardSettings
    first: dict[str, float] = field(default_factory=dict)
    exam: dict[str, float] = field(default_factory=dict)
    raised: list[Alarm] = field(default_factory=list)
    active: set[str] = field(default_factory=set)

    def look(self, number: int, numbers: Mapping[str, float]) -> list[Alarm]:
        """New alarms of a round's numbers (statistics.py)."""
        if not self.first:
            self.first = dict(numbers)
        return self._news(number, list(self._round_alarms(number, numbers)), ("kl", "entropy", "length", "repetition"))

    def look_held_out(self, number: int, numbers: Mapping[str, float]) -> list[Alarm]:
        """New alarms of a held-out measurement: reward, judge_score, watch.<name> and watch_std.<name>."""
        if not self.exam:
            self.exam = dict(numbers)
        return self._news(number, list(self._overoptimised(number, numbers)), ("overoptimisation",))

    def stops(self, alarms: list[Alarm]) -> Alarm | None:
        """The alarm that ends the run, where the recipe says so."""
        return next((alarm for alarm in alarms if alarm.guard in self.settings.stop_on), None)

    def as_rows(self) -> list[dict[str, Any]]:
        """All alarms of the run, as the registry keeps them."""
        return [asdict(alarm) for alarm in self.raised]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"first": self.first, "exam": self.exam, "raised": self.as_rows(), "active": sorted(self.active)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The state that `state` gave."""
        self.first, self.exam = dict(state["first"]), dict(state["exam"])
        self.raised, self.active = [Alarm(**row) for row in state["raised"]], set(state["active"])

    def _round_alarms(self, number: int, now: Mapping[str, float]) -> Iterator[Alarm]:
        limits, first = self.settings, self.first
        if limits.kl_limit is not None and now["kl"] > limits.kl_limit:
            said = f"KL to the reference is {now['kl']:.2f} nats per response, above the limit of {limits.kl_limit:g}"
            yield Alarm(number, "kl", now["kl"], limits.kl_limit, said)
        floor = limits.entropy_floor * first["entropy"]
        if now["entropy"] < floor:
            said = f"entropy fell to {now['entropy']:.3f} nats per token, from {first['entropy']:.3f}: answers collapse"
            yield Alarm(number, "entropy", now["entropy"], floor, said)
        correlation = now["length_correlation"]
        if correlation > max(limits.length_correlation, first["length_correlation"] + LENGTH_STEP):
            said = f"reward and length correlate at {correlation:.2f}: length may be what is rewarded"
            yield Alarm(number, "length", correlation, limits.length_correlation, said)
        if now["repetition"] > max(limits.repetition, first["repetition"]):
            said = f"{now['repetition']:.0%} of the runs of four tokens repeat themselves within a response"
            yield Alarm(number, "repetition", now["repetition"], limits.repetition, said)

    def _overoptimised(self, number: int, now: Mapping[str, float]) -> Iterator[Alarm]:
        """A judge or a watched reward that is lower than at the start while the trained reward is higher."""
        if now["reward"] <= self.exam["reward"]:
            return
        for name, value in now.items():
            if name != "judge_score" and not name.startswith("watch."):
                continue
            scale = self.exam.get(name.replace("watch.", "watch_std.", 1), 0.0) if name != "judge_score" else 1.0
            fall = (self.exam[name] - value) / (scale or 1.0)
            if fall > self.settings.gold_drop:
                words = "the judge's score" if name == "judge_score" else f"the watched reward '{name[6:]}'"
                said = (
                    f"held-out reward rose while {words} fell from {self.exam[name]:.3f} to {value:.3f}: over-optimised"
                )
                yield Alarm(number, "overoptimisation", fall, self.settings.gold_drop, said)

    def _news(self, number: int, alarms: list[Alarm], about: tuple[Guard, ...]) -> list[Alarm]:
        found = [alarm for alarm in alarms if alarm.guard not in self.active]
        self.active = (self.active - set(about)) | {alarm.guard for alarm in alarms}
        self.raised += found
        return found
