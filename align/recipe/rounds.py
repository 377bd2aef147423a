"""A recipe with its loops written out: each round of a `constitution` stage as stages that any recipe could have.

    constitution            -> constitution.1.critique, constitution.1, constitution.2.critique, constitution.2, constitution

The stages of a round are made, cached, resumed and recorded like all others; the last one is the choice among the rounds.
A round's name has a dot, which no name in a recipe may have, so none can be in the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.recipe.critique_settings import CritiqueSettings, CritiqueWork
from align.recipe.loop_settings import ROUND, ConstitutionSettings, MixSettings
from align.recipe.objective_settings import RewardSettings
from align.recipe.ppo_settings import ModelReward, PpoSettings, Reward
from align.recipe.settings import DataSettings, Recipe, Stage


def round_name(loop: str, number: int) -> str:
    """Name of the stage that trains in a round, counted from 1."""
    return f"{loop}.{number}"


def critique_name(loop: str, number: int) -> str:
    """Name of the critique stage of a round."""
    return f"{loop}.{number}.critique"


def reward_name(loop: str, number: int) -> str:
    """Name of the reward model of a round, where it trains one."""
    return f"{loop}.{number}.reward"


def stages_of_loop(recipe: Recipe, name: str) -> list[str]:
    """The stages that a loop was written out as; none for any other stage, and where loops are not written out."""
    stage = recipe.stages[name]
    rounds = range(1, stage.rounds + 1) if isinstance(stage, ConstitutionSettings) else ()
    return [one for number in rounds for one in (critique_name(name, number), round_name(name, number))]


def round_of(recipe: Recipe, name: str) -> tuple[str, int] | None:
    """The loop that a stage belongs to and the number of its round; None for a stage that the recipe names itself."""
    loop, dot, rest = name.partition(".")
    if not dot or not isinstance(recipe.stages.get(loop), ConstitutionSettings):
        return None
    return loop, int(rest.partition(".")[0])


def written_out(recipe: Recipe) -> Recipe:
    """The recipe with the rounds of each `constitution` stage before it."""
    stages: dict[str, Stage] = {}
    data = dict(recipe.data)
    for name, stage in recipe.stages.items():
        if isinstance(stage, ConstitutionSettings):
            for number in range(1, stage.rounds + 1):
                seed = recipe.seed if stage.seed is None else stage.seed
                stages |= _round(name, stage, number, seed + number - 1)
                data |= _mixture(name, stage, number)
        stages[name] = stage
    return recipe.model_copy(update={"stages": stages, "data": data})


def _round(loop: str, stage: ConstitutionSettings, number: int, seed: int) -> Mapping[str, Stage]:
    """The stages of one round; each starts from the one before it, and draws anew: other principles for a prompt."""
    start = stage.from_ if number == 1 else round_name(loop, number - 1)
    critique = critique_name(loop, number)
    work = {key: getattr(stage, key) for key in CritiqueWork.model_fields}
    made: dict[str, Stage] = {
        critique: CritiqueSettings.model_construct(
            kind="critique", from_=start, seed=seed, data=stage.data, quantize=None, **work
        )
    }
    own: dict[str, Any] = {"from_": start, "seed": seed}
    if stage.trains_reward:
        settings = stage.reward or RewardSettings.model_validate({"kind": "reward", "data": ROUND})
        made[reward_name(loop, number)] = settings.model_copy(update=own | {"data": f"{critique}.preferences"})
    if isinstance(stage.train, PpoSettings):
        rewards = [_of_round(term, loop, number) for term in stage.train.reward]
        update = own | {"data": stage.data, "reward": rewards}
    else:
        update = own | {"data": _rows(loop, stage, number)}
    if number > 1:  # the adapter that the first round put on is trained on
        update |= {"adapter": None, "quantize": None}
    made[round_name(loop, number)] = stage.train.model_copy(update=update)
    return made


def _of_round(term: Reward, loop: str, number: int) -> Reward:
    """A part of a reward, with the round's own reward model where it stands for that."""
    if isinstance(term, ModelReward) and term.from_ == ROUND:
        return term.model_copy(update={"from_": reward_name(loop, number)})
    return term


def _rows(loop: str, stage: ConstitutionSettings, number: int) -> str:
    """What a round trains on: its own rows, or a mixture of them."""
    return f"{round_name(loop, number)}.mix" if stage.mix else _own_rows(loop, stage, number)


def _own_rows(loop: str, stage: ConstitutionSettings, number: int) -> str:
    return f"{critique_name(loop, number)}.{'sft' if stage.train.kind == 'sft' else 'preferences'}"


def _mixture(loop: str, stage: ConstitutionSettings, number: int) -> Mapping[str, DataSettings]:
    if not stage.mix:
        return {}
    own = MixSettings.model_construct(data=_own_rows(loop, stage, number), weight=stage.weight)
    return {_rows(loop, stage, number): DataSettings(mix=[own, *stage.mix])}
