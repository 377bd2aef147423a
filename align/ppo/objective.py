"""PPO as an objective of the one loop: a round is collected when its first step comes, then learnt from in minibatches.

    for each round:  collect responses and their advantages                            (collection.py)
        for each epoch, for each minibatch:
            ratio  = exp(logps - old_logps)
            loss   = -min(ratio A, clip(ratio) A)                                      (Schulman 2017, eq. 7)
                   + value_coefficient * max((V - R)^2, (clip(V) - R)^2) / 2
                   + kl_coefficient * KL, where the KL is charged in the loss
                   - entropy_coefficient * entropy

Rows of the loop are tickets (prompts.py) until `prepared` makes them places in the round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.advantages import KlController, RunningMoments
from align.models.head import target_logps
from align.models.roles import Roles
from align.models.trunk import hidden_states
from align.objective import Objective
from align.ppo.collection import Collected, Collector
from align.ppo.guards import Alarm, Guards
from align.ppo.proof import Proof
from align.ppo.round import Round, Tokens
from align.ppo_losses import Average, kl_losses, loss_sum, policy_losses, step_weight, value_losses
from align.progress import Progress
from align.recipe.ppo_settings import PpoSettings
from align.rollout.inference import device_of

STATE = "ppo.json"


@dataclass
class Journal:
    """What the run has to tell at its end: held-out answers over time, and why it stopped early, if it did."""

    exams: list[dict[str, Any]] = field(default_factory=list)
    stopped_by: str | None = None
    rounds: int = 0


Exam = Callable[[Roles, int], Mapping[str, Any]]  # (roles, round) -> held-out numbers, and "answers" for the journal


class PpoLoss(Objective):
    """The loss of one run, and the rounds that it learns from."""

    def __init__(
        self,
        settings: PpoSettings,
        collector: Collector,
        steps_per_round: int,
        exam: Exam,
        proof: Proof,
        progress: Progress,
    ) -> None:
        self.settings, self.collector, self.steps_per_round = settings, collector, steps_per_round
        self.exam, self.proof, self.progress = exam, proof, progress
        self.guards = Guards(settings.guards)
        self.journal = Journal()
        self.round: Round | None = None
        self.round_is_over = False
        self._first_step = False
        self._kl_of_step: list[float] = [0.0, 0.0]

    # The loop's side --------------------------------------------------------------------------------------------------

    def prepared(self, model: nn.Module, rows: Sequence[int]) -> Sequence[int]:
        """Places of the tickets in their round, which is collected here when it is new; none when the round is over."""
        assert isinstance(model, Roles)
        number = rows[0] // self.settings.rollouts
        if self.finished:  # by a guard, before the state was saved that this run goes on from
            return []
        if self.round is None or self.round.number != number:
            self._begin(model, number)
        else:
            self._first_step = False
            self._end_round_on_kl()
        self._kl_of_step = [0.0, 0.0]
        if self.round_is_over or self.finished:
            return []
        return [ticket % self.settings.rollouts for ticket in rows]

    def weight(self, rows: Sequence[int]) -> float:
        """Response tokens of the step, or responses, as `average` says."""
        return step_weight([len(self._now.responses[row]) for row in rows], self.settings.average)

    def tokens(self, row: int) -> int:
        """Tokens of prompt and response."""
        return self._now.length(row)

    def again(self, model: nn.Module, rows: Sequence[int]) -> None:
        """The round stays; only what its KL was counted from is forgotten."""
        self._kl_of_step = [0.0, 0.0]

    @property
    def finished(self) -> bool:
        """Whether a guard stopped the run."""
        return self.journal.stopped_by is not None

    def __call__(self, model: nn.Module, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss, and what the log shows of it."""
        assert isinstance(model, Roles)
        tokens = self._now.tokens(rows, device_of(model))
        known = self._now.columns(rows, tokens.mask)
        warming = self._now.number < self._first_round
        hidden = None
        losses = torch.zeros(tokens.mask.shape, device=tokens.mask.device)
        shown: dict[str, Tensor] = {}
        if not warming or model.shares_trunk:
            hidden = hidden_states(model.policy, tokens.rows)
        if hidden is not None and not warming:
            losses, shown = self._policy_part(model, tokens, known, hidden)
        if model.value_head is not None:
            read = hidden.detach() if warming and hidden is not None else hidden
            values = tokens.table(model.values(tokens.rows, tokens.places, read))
            found = value_losses(values, known["values"], known["returns"], tokens.mask, clip=self.settings.value.clip)
            losses = losses + self.settings.value.coefficient * found.losses
            shown |= {"value_loss": found.losses, "value_clip_fraction": found.clipped}
        total = loss_sum(losses, tokens.mask, self.settings.average, self.settings.max_new_tokens)
        unit: Average = "tokens" if self.settings.average == "tokens" else "rows"
        return total, {
            name: float(loss_sum(values.detach().float(), tokens.mask, unit, 1)) for name, values in shown.items()
        }

    def _policy_part(
        self, model: Roles, tokens: Tokens, known: Mapping[str, Tensor], hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the policy at each token, (B, R), and numbers for the log, (B, R) each."""
        settings, mask = self.settings, tokens.mask
        flat, entropies = target_logps(
            model.policy, hidden[tokens.places], tokens.targets, temperature=settings.temperature,
            entropy=settings.entropy_coefficient > 0,
        )  # fmt: skip
        logps = tokens.table(flat)
        found = policy_losses(
            logps, known["old_logps"], known["advantages"], mask, clip=settings.clip, clip_high=settings.clip_high
        )
        losses = found.losses * known["weights"]
        shown = {"policy_loss": found.losses, "clip_fraction": found.clipped}
        shown["round_kl"] = found.ratio - 1 - (logps - known["old_logps"]) * mask  # k3 from the round's start
        if settings.kl_in == "loss" and settings.kl_coefficient:
            charge = kl_losses(logps, known["reference_logps"], mask, settings.kl_estimator)
            losses = losses + self.collector.controls.kl.value * charge
        if entropies is not None:
            losses = losses - settings.entropy_coefficient * tokens.table(entropies)
        if self._first_step and self._now.number == self._first_round:
            self.proof.first_ratio(found.ratio.detach(), mask)
        self._kl_of_step[0] += float((shown["round_kl"].detach() * mask).sum())
        self._kl_of_step[1] += float(mask.sum())
        return losses, shown

    # Rounds -----------------------------------------------------------------------------------------------------------

    @property
    def _first_round(self) -> int:
        """The first round that trains the policy."""
        return self.settings.value.warmup_rounds

    @property
    def _now(self) -> Round:
        assert self.round is not None, "a round is collected before it is learnt from"
        return self.round

    def _begin(self, roles: Roles, number: int) -> None:
        """Collect a round, log its numbers, look at the guards."""
        step = number * self.steps_per_round + 1
        self.round_is_over, self._first_step = False, True
        self._examine(roles, number, step)
        collected = self.collector.collect(roles, number)
        self.round = collected.round
        self.journal.rounds = number + 1
        self.progress.metrics(step, {f"round.{name}": value for name, value in collected.numbers.items()})
        if number == 0:
            self._prove(collected)
        self._sound(self.guards.look(number, collected.numbers))

    def _prove(self, collected: Collected) -> None:
        found = collected.round
        if self.settings.engine == "local":  # weights correct for another
            self.proof.generator(collected.numbers["mismatch"])
        mask = found.tokens(range(len(found.responses)), torch.device("cpu")).mask
        self.proof.reference_and_values(
            found, collected.token_rewards, mask, kl_charged=self.settings.kl_in == "reward"
        )

    def _examine(self, roles: Roles, number: int, step: int) -> None:
        """A held-out measurement, where one is due."""
        found = dict(self.exam(roles, number))
        if not found:
            return
        answers = found.pop("answers", None)
        if answers is not None:
            self.journal.exams.append({"round": number, "answers": answers})
        self.progress.metrics(
            step, {f"eval.{name}": value for name, value in found.items() if not name.startswith("watch_std.")}
        )
        self._sound(self.guards.look_held_out(number, found))

    def _sound(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.progress.note(f"warning: round {alarm.round}: {alarm.said}")
        stopping = self.guards.stops(alarms)
        if stopping is not None:
            self.journal.stopped_by = stopping.guard
            self.progress.note(f"stopped by the guard '{stopping.guard}' (guards.stop_on); the policy is kept as it is")

    def _end_round_on_kl(self) -> None:
        """Whether the step before went too far from the round's start."""
        limit, (total, count) = self.settings.round_kl_limit, self._kl_of_step
        if limit is not None and count and total / count > limit:
            self.round_is_over = True

    # State ------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """The round at hand, and all that goes on from round to round."""
        self._now.save(folder)
        controls = self.collector.controls
        state = {
            "kl": controls.kl.as_dict(), "moments": controls.moments.as_dict(), "guards": self.guards.state(),
            "proof": self.proof.as_rows(), "journal": vars(self.journal), "round_is_over": self.round_is_over,
            "kl_of_step": self._kl_of_step,
        }  # fmt: skip
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        controls = self.collector.controls
        controls.kl = KlController.from_dict(state["kl"])
        controls.moments = RunningMoments.from_dict(state["moments"])
        self.guards.restore(state["guards"])
        self.proof.restore(state["proof"])
        self.journal = Journal(**state["journal"])
        self.round, self.round_is_over = Round.load(folder), state["round_is_over"]
        self._kl_of_step = state["kl_of_step"]
