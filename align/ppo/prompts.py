"""Which prompts a round answers and which of its responses an optimiser step learns from: decided by the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from align.batches import epoch_order
from align.recipe.ppo_settings import PpoSettings
from align.streams import Stream


def rounds_of(prompts: int, settings: PpoSettings) -> int:
    """Rounds of a run over that many prompts: as the recipe says, else until each was answered `epochs` times."""
    if settings.rounds is not None:
        return settings.rounds
    return max(1, math.ceil(settings.epochs * prompts * settings.samples / settings.rollouts))


def prompts_of_round(number: int, prompts: int, settings: PpoSettings, seed: int) -> list[int]:
    """Places of a round's prompts, each as often as the estimator takes samples, those side by side.

    The rounds together go through shuffled epochs, one after the other, across their seams.
    """
    count = settings.rollouts // settings.samples
    positions = range(number * count, (number + 1) * count)
    epochs = range(positions[0] // prompts, positions[-1] // prompts + 1)
    orders = {epoch: epoch_order(prompts, seed, epoch) for epoch in epochs}
    places = [orders[position // prompts][position % prompts] for position in positions]
    return [place for place in places for _ in range(settings.samples)]


class RoundStream(Stream):
    """Tickets of each optimiser step: round number times `rollouts`, plus the place of a response in the round."""

    def __init__(self, rounds: int, settings: PpoSettings, seed: int) -> None:
        self.rounds, self.settings, self.seed = rounds, settings, seed
        self.steps_per_round = settings.round_epochs * math.ceil(settings.rollouts / settings.batch_size)
        self.steps = min(rounds * self.steps_per_round, settings.max_steps or rounds * self.steps_per_round)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            number, step_in_round = divmod(step, self.steps_per_round)
            epoch, batch = divmod(step_in_round, math.ceil(self.settings.rollouts / self.settings.batch_size))
            order = epoch_order(self.settings.rollouts, self.seed, number * self.settings.round_epochs + epoch)
            chosen = order[batch * self.settings.batch_size : (batch + 1) * self.settings.batch_size]
            yield [number * self.settings.rollouts + place for place in chosen]
