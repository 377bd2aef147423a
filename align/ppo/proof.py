"""The proof at step 0: what must hold before a policy learns anything, measured on every run and kept with it.

A failure means that rewards, reference or probabilities are not what the recipe says, and nothing learnt from them would
be either; so it stops the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from align.data.examples import Messages, Question, prompt_of
from align.errors import AlignError, StageFailed
from align.models.source import Source
from align.ppo.round import Round
from align.rewards.model import RewardModel, said

KL_LIMIT = 1e-5  # nats, the largest of any token: policy and reference are the same numbers through the same arithmetic
EXACT_MISMATCH, HALF_MISMATCH = 1e-2, 1e-1  # nats per token, the mean of a round
EXACT_LIMIT, HALF_LIMIT = 1e-3, 5e-2  # ratio and rewards under other batch shapes, in float32 and in bfloat16
PROBES, PROBE_CHARACTERS = 8, 4


@dataclass(frozen=True)
class Check:
    """One thing that must hold: a measured value and the most that it may be."""

    check: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it does; not for NaN."""
        return self.value <= self.limit


@dataclass
class Proof:
    """The checks of one run so far. exact: whether it computes in float32."""

    exact: bool
    checks: list[Check] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """How far the same computation in two batch shapes may be off."""
        return EXACT_LIMIT if self.exact else HALF_LIMIT

    def as_rows(self) -> list[dict[str, Any]]:
        """The form that the registry keeps."""
        return [{**asdict(check), "holds": check.holds} for check in self.checks]

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The checks behind `as_rows`."""
        self.checks = [Check(row["check"], row["value"], row["limit"]) for row in rows]

    def reference_and_values(self, first: Round, rewards: Tensor, mask: Tensor, *, kl_charged: bool) -> None:
        """KL 0, no reward on padding, finite values. rewards: of each token of the first round, (B, R)."""
        ratios = torch.where(mask, first.old_logps - first.reference_logps, 0.0)
        self._add("KL to the reference is 0 (largest of any token, nats)", float(ratios.abs().max()), KL_LIMIT)
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        allowed = mask if kl_charged else last
        astray = int(((rewards != 0) & ~allowed).sum())
        self._add("no reward sits on a pad token (tokens)", float(astray), 0.0)
        wild = int((~torch.isfinite(first.values)).sum())
        self._add("the value model predicts finite values (tokens that are not)", float(wild), 0.0)

    def generator(self, mismatch: float) -> None:
        """Refuses an architecture whose decoding with a cache is not the model that is trained.

        mismatch: of the log-probabilities while generating and while learning, nats per token.
        """
        if not mismatch <= (EXACT_MISMATCH if self.exact else HALF_MISMATCH):
            raise StageFailed(
                f"step 0 of ppo: responses were generated with other probabilities than the policy's "
                f"(off by {mismatch:.3g} nats per token)",
                "Nothing was trained. This architecture cannot be decoded with a cache here; use another model.",
            )

    def rewards_inside(self, outside: Mapping[str, Sequence[float]], inside: Mapping[str, Sequence[float]]) -> None:
        """The rewards of probe texts as `align score` gives them against those of the opened roles."""
        gaps = [
            abs(a - b) / max(1.0, abs(a))
            for name, values in outside.items()
            for a, b in zip(values, inside[name], strict=True)
        ]
        self._add("the reward inside is that of `align score` (largest gap)", max(gaps, default=0.0), self.limit)

    def first_ratio(self, ratio: Tensor, mask: Tensor) -> None:
        """The probability ratio of the first optimiser step is 1; ratio: (B, R) of one of its micro-batches."""
        name = "the ratio is 1 in the first minibatch (largest gap)"
        before = [check for check in self.checks if check.check == name]
        value = max([float(torch.where(mask, ratio - 1, 0.0).abs().max()), *(check.value for check in before)])
        self.checks = [check for check in self.checks if check.check != name]
        self._add(name, value, self.limit)

    def _add(self, check: str, value: float, limit: float) -> None:
        found = Check(check, value, limit)
        self.checks.append(found)
        if not found.holds:
            raise StageFailed(
                f"step 0 of ppo: it does not hold that {check}: {value:.3g}, allowed {limit:g}",
                "Nothing was trained. Use precision: float32, or report this recipe as a bug.",
            )


def probe_texts(questions: Sequence[Question]) -> list[tuple[Messages, Messages]]:
    """The shortest prompts, each with a text that is surely not empty, and short: how its own last turn begins."""
    prompts = sorted(map(prompt_of, questions), key=lambda prompt: sum(len(turn.content) for turn in prompt))
    return [(prompt, said(prompt[-1].content.strip()[:PROBE_CHARACTERS])) for prompt in prompts[:PROBES]]


def outside_scores(
    sources: Mapping[str, Source], probes: Sequence[tuple[Messages, Messages]]
) -> dict[str, list[float]]:
    """What `align score` says of the probes, by reward model; each is opened, asked and let go.

    Raises AlignError, naming the reward model, for one that cannot be opened, or gives rewards that are not finite.
    """
    found = {}
    for name, source in sources.items():
        try:
            found[name] = RewardModel.open(source).score(probes)
        except AlignError as error:
            error.message = f"reward model '{name}': {error.message}"
            raise
    return found
