"""The graph that a recipe's stages and data sets make, and what can be wrong with it. Needs no files and no torch.

A name in `from:` or `reward:` that is no stage of the recipe is left alone: it may be recipe/stage, a tag or a folder,
and only the registry knows those.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from align.errors import AlignError, did_you_mean
from align.recipe.critique_settings import CheckpointCritic, CritiqueSettings, JudgeCritic
from align.recipe.loop_settings import ROUND
from align.recipe.outputs import maker_of, output_problems, outputs_in, unknown_data
from align.recipe.places import Problem
from align.recipe.ppo_settings import JudgeReward, ModelReward, PpoSettings
from align.recipe.rounds import stages_of_loop
from align.recipe.settings import (
    ConstitutionSettings,
    MergeSettings,
    Recipe,
    RewardSettings,
    Stage,
    TrainingSettings,
)

Graph = Mapping[str, Sequence[str]]


def check_graph(recipe: Recipe) -> list[Problem]:
    """Names that do not exist, cycles, and stages that cannot start where they say."""
    mixed = list(_mix_cycle(recipe))
    problems = [*_unknown_data(recipe), *mixed]
    if mixed:
        return problems
    cycle = find_cycle(stage_graph(recipe))
    if cycle:
        return [*problems, _cycle_problem(recipe, cycle)]
    problems += output_problems(recipe)
    for name, stage in recipe.stages.items():
        problems += _wrong_start(recipe, name, stage)
        if isinstance(stage, TrainingSettings | ConstitutionSettings):
            problems += _wrong_adapter(recipe, name, stage)
        if isinstance(stage, PpoSettings):
            problems += [*_wrong_rewards(recipe, name, stage), *_wrong_value(recipe, name, stage)]
        if isinstance(stage, CritiqueSettings | ConstitutionSettings):
            problems += _wrong_critic(recipe, name, stage)
        if isinstance(stage, ConstitutionSettings) and isinstance(stage.train, PpoSettings):
            problems += [
                *_wrong_rewards(recipe, name, stage.train, ("train",)),
                *_wrong_value(recipe, name, stage.train, ("train",)),
            ]
    return problems


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What is no error but hardly meant: data sets that nothing uses, and rewards that nothing checks."""
    used = {recipe.evaluation.prompts}
    used |= {stage.data for stage in recipe.stages.values() if not isinstance(stage, MergeSettings)}
    for stage in recipe.stages.values():
        used |= {part.data for part in stage.mix} if isinstance(stage, ConstitutionSettings) else set()
    for settings in recipe.data.values():
        used |= {part.data for part in settings.mix} | set(settings.decontaminate)
    unused = [f"data set '{name}' is used by no stage" for name in recipe.data if name not in used]
    unseen = [
        f"stage '{name}' trains on a reward model, and with neither `evaluation.judge` nor `watch:` nothing would show "
        "that the reward rises while the answers get worse"
        for name, stage in recipe.stages.items()
        if isinstance(stage, PpoSettings) and recipe.evaluation.judge is None and _only_models_see(stage)
    ]
    return unused + unseen


def reward_references(stage: Stage) -> list[str]:
    """What the rewards of a stage name as reward models: those that it trains on, then those that it watches."""
    terms = [*stage.reward, *stage.watch] if isinstance(stage, PpoSettings) else []
    return list(dict.fromkeys(term.from_ for term in terms if isinstance(term, ModelReward)))


def critic_reference(stage: Stage) -> str | None:
    """What the critic of a stage names as its model; None: it names none."""
    critic = stage.critic if isinstance(stage, CritiqueSettings | ConstitutionSettings) else None
    return critic.from_ if isinstance(critic, CheckpointCritic) else None


def data_key(stage: Stage) -> str:
    """The key under which a stage names its data set in the recipe."""
    return type(stage).model_fields["data"].alias or "data"


def stage_graph(recipe: Recipe) -> dict[str, list[str]]:
    """Each stage with the stages of the recipe that it needs: where it starts, its models, and who makes its data."""
    found: dict[str, list[str]] = {}
    for name, stage in recipe.stages.items():
        needs = [*_named_by(recipe, stage), *stages_of_loop(recipe, name)]
        found[name] = list(dict.fromkeys(need for need in needs if need is not None and need in recipe.stages))
    return found


def _named_by(recipe: Recipe, stage: Stage) -> list[str | None]:
    """All that a stage names as a checkpoint, and the makers of its data; some of them may be no stages of the recipe."""
    rewards = reward_references(stage.train if isinstance(stage, ConstitutionSettings) else stage)
    parts = [part.data for part in stage.mix] if isinstance(stage, ConstitutionSettings) else []
    data = [] if isinstance(stage, MergeSettings) else [stage.data]
    makers = [maker_of(recipe, output) for one in (*data, *parts) for output in outputs_in(recipe, one)]
    return [stage.from_, *rewards, critic_reference(stage), *makers]


def topological_order(recipe: Recipe) -> list[str]:
    """Every stage after those it needs, otherwise in the order of the recipe."""
    return needed(recipe, list(recipe.stages))


def needed(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The named stages and all that they need, in an order in which they can run. Raises AlignError on unknown names."""
    graph = stage_graph(recipe)
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in graph:
            raise AlignError(f"recipe '{recipe.name}' has no stage '{name}'.", did_you_mean(name, graph))
        if name not in wanted:
            wanted.add(name)
            waiting += graph[name]
    return _ordered({name: graph[name] for name in graph if name in wanted})


def stages_of_kind(recipe: Recipe, kind: str) -> list[str]:
    """Stages of a kind; `adapter` means sft stages with an adapter. Raises AlignError when there is none."""
    found = [name for name, stage in recipe.stages.items() if kind in _kinds_of(stage)]
    if not found:
        kinds = {each for stage in recipe.stages.values() for each in _kinds_of(stage)}
        raise AlignError(f"recipe '{recipe.name}' has no stage of kind '{kind}'.", did_you_mean(kind, kinds))
    return found


def _kinds_of(stage: Stage) -> list[str]:
    adapted = isinstance(stage, TrainingSettings) and stage.kind == "sft" and stage.adapter is not None
    return [stage.kind, *(["adapter"] if adapted else [])]


def find_cycle(graph: Graph) -> list[str]:
    """A path that comes back to where it started, its first name repeated at the end; empty when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        backwards: list[str] = error.args[1]  # from what is needed to what needs it
        return backwards[::-1]
    return []


def own_adapter(stage: Stage) -> TrainingSettings | None:
    """The settings by which a stage puts an adapter on; None: it puts none on."""
    trained = stage.train if isinstance(stage, ConstitutionSettings) else stage
    return trained if isinstance(trained, TrainingSettings) and trained.adapter else None


def gives_adapter(recipe: Recipe, reference: str | None) -> bool | None:
    """Whether what a `from:` names is an adapter; None: it is not of this recipe, so only the registry knows."""
    for stage in _chain(recipe, reference):
        if isinstance(stage, MergeSettings):
            return False
        if own_adapter(stage):
            return True
        if stage.from_ is None:
            return False
    return None


def trains_adapter(recipe: Recipe, name: str) -> bool | None:
    """Whether a stage trains an adapter, its own or the one it starts from; None: only the registry knows."""
    stage = recipe.stages[name]
    trains = isinstance(stage, TrainingSettings | ConstitutionSettings)
    if not trains or stage.from_ is None:
        return trains and own_adapter(stage) is not None
    if own_adapter(stage) or adapter_stage(recipe, name):
        return True
    return False if isinstance(stage, RewardSettings) else gives_adapter(recipe, stage.from_)


def adapter_stage(recipe: Recipe, name: str) -> TrainingSettings | None:
    """The stage of the recipe whose adapter a stage trains: itself or one it starts from; None: it trains all weights.

    A reward model that starts from a policy's adapter does not go on with it: the two are merged first.
    """
    first = recipe.stages[name]
    for stage in _chain(recipe, name):
        if isinstance(stage, MergeSettings):
            return None
        if adapted := own_adapter(stage):
            crosses = isinstance(first, RewardSettings) and not isinstance(stage, RewardSettings)
            return None if crosses else adapted
    return None


def _ordered(graph: Graph) -> list[str]:
    """Names after what they need; among those that are ready the first of the mapping comes first."""
    positions = {name: position for position, name in enumerate(graph)}
    names = list(graph)
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    ready: list[int] = []
    order: list[str] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, positions[name])
        order.append(names[heapq.heappop(ready)])
        sorter.done(order[-1])
    return order


def _chain(recipe: Recipe, reference: str | None) -> Iterator[Stage]:
    """The stage that `reference` names and those that it comes from, as far as they are of this recipe; no cycles."""
    while reference is not None and reference in recipe.stages:
        stage = recipe.stages[reference]
        yield stage
        reference = stage.from_


def _unknown_data(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        if not isinstance(stage, MergeSettings):
            made = isinstance(stage, TrainingSettings)
            yield from unknown_data(recipe, ("stages", name, data_key(stage)), stage.data, made=made)
        for index, part in enumerate(stage.mix if isinstance(stage, ConstitutionSettings) else []):
            yield from unknown_data(recipe, ("stages", name, "mix", index, "data"), part.data, made=True)
    for name, settings in recipe.data.items():
        for index, part in enumerate(settings.mix):
            yield from unknown_data(recipe, ("data", name, "mix", index, "data"), part.data, made=True)
        for index, other in enumerate(settings.decontaminate):
            path = ("data", name, "decontaminate", index)
            if other == name:
                yield Problem(path, f"data set '{name}' would be cleaned of its own rows.")
            elif not any(mark in other for mark in "./\\"):  # with one of these it is a file
                yield from unknown_data(recipe, path, other, made=False)
    if recipe.evaluation.prompts is not None:
        yield from unknown_data(recipe, ("evaluation", "prompts"), recipe.evaluation.prompts, made=False)


def _mix_cycle(recipe: Recipe) -> Iterator[Problem]:
    graph = {
        name: [part.data for part in settings.mix if part.data in recipe.data] for name, settings in recipe.data.items()
    }
    cycle = find_cycle(graph)
    if cycle:
        yield Problem(("data", cycle[0], "mix"), f"a cycle in `mix:`: {' -> '.join(cycle)}.")


def _cycle_problem(recipe: Recipe, cycle: Sequence[str]) -> Problem:
    keys = [_key_that_names(recipe.stages[name], need) for name, need in itertools.pairwise(cycle)]
    written = " and ".join(f"`{key}:`" for key in sorted(set(keys)))
    return Problem(("stages", cycle[0], keys[0]), f"a cycle in {written}: {' -> '.join(cycle)}.")


def _key_that_names(stage: Stage, need: str) -> str:
    """The key of a stage that names a stage it needs."""
    if stage.from_ == need:
        return "from"
    if critic_reference(stage) == need:
        return "critic"
    if not isinstance(stage, MergeSettings) and stage.data.startswith(f"{need}."):
        return data_key(stage)
    if not isinstance(stage, PpoSettings) and need not in reward_references(stage):
        return "mix" if isinstance(stage, ConstitutionSettings) else data_key(stage)
    rewards = stage.reward if isinstance(stage, PpoSettings) else []
    return "reward" if any(isinstance(term, ModelReward) and term.from_ == need for term in rewards) else "watch"


def _only_models_see(stage: PpoSettings) -> bool:
    return not stage.watch and all(isinstance(term, ModelReward) for term in stage.reward)


def _wrong_rewards(recipe: Recipe, name: str, stage: PpoSettings, block: tuple[str, ...] = ()) -> Iterator[Problem]:
    """block: keys that lead from the stage to the block that names the rewards."""
    for key, terms in (("reward", stage.reward), ("watch", stage.watch)):
        what = f"stage '{name}': its {'watched ' if key == 'watch' else ''}reward"
        models: set[str] = set()
        for index, term in enumerate(terms):
            place: tuple[str | int, ...] = ("stages", name, *block, key, index)
            if isinstance(term, ModelReward) and term.from_ == ROUND and block:
                continue
            if isinstance(term, ModelReward):
                yield from _wrong_model(recipe, (*place, "from"), what, term.from_, models)
                models.add(term.from_)
            if isinstance(term, JudgeReward) and term.file is None and recipe.evaluation.judge is None:
                message = f"{what} of kind judge names no file, and `evaluation:` has no judge."
                yield Problem(place, message, "Give it a `file:`, or set `judge:` of `evaluation:`.")


def _wrong_model(
    recipe: Recipe, place: tuple[str | int, ...], what: str, reference: str, earlier: Container[str]
) -> Iterator[Problem]:
    kind = _makes_no_reward(recipe, reference)
    if kind:
        rewards = [name for name, stage in recipe.stages.items() if isinstance(stage, RewardSettings)]
        hint = f"Reward stages of the recipe: {', '.join(rewards) or 'none'}."
        yield Problem(place, f"{what} '{reference}' is no reward model: it is a stage of kind {kind}.", hint)
    if reference in earlier:
        yield Problem(place, f"{what} '{reference}' stands there twice.", "Keep one, with the sum of the weights.")


def _makes_no_reward(recipe: Recipe, reference: str) -> str | None:
    """Kind of the stage that a name leads to through merges, if that is of the recipe and makes no reward model."""
    made_by = next((stage for stage in _chain(recipe, reference) if not isinstance(stage, MergeSettings)), None)
    return None if made_by is None or isinstance(made_by, RewardSettings) else made_by.kind


def _wrong_value(recipe: Recipe, name: str, stage: PpoSettings, block: tuple[str, ...] = ()) -> Iterator[Problem]:
    """block: as in `_wrong_rewards`."""
    if stage.value.kind == "adapter" and trains_adapter(recipe, name) is False:
        yield Problem(
            ("stages", name, *block, "value", "kind"),
            f"stage '{name}' trains all weights of its policy, so its value model can be no adapter on the same base.",
            "Set value: model or trunk, or give the stage an `adapter:`.",
        )


def _wrong_critic(recipe: Recipe, name: str, stage: CritiqueSettings | ConstitutionSettings) -> Iterator[Problem]:
    place = ("stages", name, "critic")
    if isinstance(stage.critic, JudgeCritic) and stage.critic.file is None and recipe.evaluation.judge is None:
        message = f"stage '{name}': its critic is a judge without a file, and `evaluation:` has no judge."
        yield Problem(place, message, "Give it a `file:`, or set `judge:` of `evaluation:`.")
    reference = critic_reference(stage)
    maker = next(_chain(recipe, reference), None)
    if isinstance(maker, RewardSettings | CritiqueSettings):
        yield Problem(place, f"stage '{name}': its critic '{reference}' writes no text: it is of kind {maker.kind}.")


def _wrong_start(recipe: Recipe, name: str, stage: Stage) -> Iterator[Problem]:
    upstream = next((above for above in _chain(recipe, stage.from_) if isinstance(above, RewardSettings)), None)
    place = ("stages", name, "from")
    before = recipe.stages.get(stage.from_ or "")
    if isinstance(before, CritiqueSettings):
        hint = f"Name what it starts from, and '{stage.from_}.sft' or '{stage.from_}.preferences' as data."
        yield Problem(
            place, f"stage '{name}' cannot start from '{stage.from_}', which makes data sets, not a model.", hint
        )
    if upstream and not isinstance(stage, RewardSettings | MergeSettings):
        hint = (
            f"Start from '{upstream.from_}', as it does."
            if upstream.from_
            else "Leave `from` out to start from the model."
        )
        message = (
            f"stage '{name}' cannot start from '{stage.from_}': a reward model scores text, it does not write any."
        )
        yield Problem(place, message, hint)
    if isinstance(stage, MergeSettings) and stage.from_ is None:
        yield Problem(
            place[:2], f"stage '{name}' has nothing to merge: it needs `from:`, a stage with an adapter.", at_key=True
        )
    elif isinstance(stage, MergeSettings) and gives_adapter(recipe, stage.from_) is False:
        yield Problem(
            place, f"stage '{name}' has nothing to merge: '{stage.from_}' gives a whole model, not an adapter."
        )


def _wrong_adapter(recipe: Recipe, name: str, whole: TrainingSettings | ConstitutionSettings) -> Iterator[Problem]:
    stage = whole.train if isinstance(whole, ConstitutionSettings) else whole
    place = ("stages", name) if stage is whole else ("stages", name, "train")
    if stage.adapter and gives_adapter(recipe, whole.from_):
        yield Problem(
            (*place, "adapter"),
            f"stage '{name}' starts from an adapter ('{whole.from_}'), and training goes on with the adapter it starts from.",
            "Leave the block out, or put a merge stage between the two.",
            at_key=True,
        )
    if stage.quantize and not stage.adapter and gives_adapter(recipe, whole.from_) is False and whole.from_:
        yield Problem(
            (*place, "quantize"),
            f"stage '{name}' quantizes the model of '{whole.from_}', which freezes it, so it needs an 'adapter'.",
            "Add for example `adapter: {rank: 16}`.",
        )
    if stage.adapter and stage.adapter.init == "pissa" and stage.quantize:
        yield Problem(
            (*place, "adapter", "init"),
            "pissa starts from the singular values of unquantized weights, so it cannot go with 'quantize'.",
            "Leave out `init` or `quantize`.",
        )
