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
from align.recipe.ppo_settings import JudgeReward, ModelReward, PpoSettings
from align.recipe.problems import Problem
from align.recipe.settings import MergeSettings, Recipe, RewardSettings, Stage, TrainingSettings
from align.recipe.yaml_text import shown

Graph = Mapping[str, Sequence[str]]


def check_graph(recipe: Recipe) -> list[Problem]:
    """Names that do not exist, cycles, and stages that cannot start where they say."""
    problems = [*_unknown_data(recipe), *_mix_cycle(recipe)]
    cycle = find_cycle(stage_graph(recipe))
    if cycle:
        return [*problems, _cycle_problem(recipe, cycle)]
    for name, stage in recipe.stages.items():
        problems += _wrong_start(recipe, name, stage)
        if isinstance(stage, TrainingSettings):
            problems += _wrong_adapter(recipe, name, stage)
        if isinstance(stage, PpoSettings):
            problems += [*_wrong_rewards(recipe, name, stage), *_wrong_value(recipe, name, stage)]
    return problems


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What is no error but hardly meant: data sets that nothing uses, and rewards that nothing checks."""
    used = {recipe.evaluation.prompts}
    used |= {stage.data for stage in recipe.stages.values() if isinstance(stage, TrainingSettings)}
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


def data_key(stage: TrainingSettings) -> str:
    """The key under which a stage names its data set in the recipe."""
    return type(stage).model_fields["data"].alias or "data"


def stage_graph(recipe: Recipe) -> dict[str, list[str]]:
    """Each stage with the stages of the recipe that it needs: where it starts, then its reward models."""
    named = {name: [stage.from_, *reward_references(stage)] for name, stage in recipe.stages.items()}
    return {name: [need for need in dict.fromkeys(needs) if need in recipe.stages] for name, needs in named.items()}


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


def gives_adapter(recipe: Recipe, reference: str | None) -> bool | None:
    """Whether what a `from:` names is an adapter; None: it is not of this recipe, so only the registry knows."""
    for stage in _chain(recipe, reference):
        if isinstance(stage, MergeSettings):
            return False
        if isinstance(stage, TrainingSettings) and stage.adapter:
            return True
        if stage.from_ is None:
            return False
    return None


def trains_adapter(recipe: Recipe, name: str) -> bool | None:
    """Whether a stage trains an adapter, its own or the one it starts from; None: only the registry knows."""
    stage = recipe.stages[name]
    if not isinstance(stage, TrainingSettings) or stage.from_ is None:
        return isinstance(stage, TrainingSettings) and stage.adapter is not None
    if stage.adapter or adapter_stage(recipe, name):
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
        if isinstance(stage, TrainingSettings) and stage.adapter:
            crosses = isinstance(first, RewardSettings) and not isinstance(stage, RewardSettings)
            return None if crosses else stage
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
        if isinstance(stage, TrainingSettings):
            yield from _unknown_name(recipe, ("stages", name, data_key(stage)), stage.data)
    for name, settings in recipe.data.items():
        for index, part in enumerate(settings.mix):
            yield from _unknown_name(recipe, ("data", name, "mix", index, "data"), part.data)
        for index, other in enumerate(settings.decontaminate):
            path = ("data", name, "decontaminate", index)
            if other == name:
                yield Problem(path, f"data set '{name}' would be cleaned of its own rows.")
            elif not any(mark in other for mark in "./\\"):  # with one of these it is a file
                yield from _unknown_name(recipe, path, other)
    if recipe.evaluation.prompts is not None:
        yield from _unknown_name(recipe, ("evaluation", "prompts"), recipe.evaluation.prompts)


def _unknown_name(recipe: Recipe, path: tuple[str | int, ...], data: str) -> Iterator[Problem]:
    if data not in recipe.data:
        known = did_you_mean(data, recipe.data) if recipe.data else "Define it under `data:`."
        yield Problem(path, f"no data set {shown(data)} in this recipe. {known}")


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
    rewards = stage.reward if isinstance(stage, PpoSettings) else []
    return "reward" if any(isinstance(term, ModelReward) and term.from_ == need for term in rewards) else "watch"


def _only_models_see(stage: PpoSettings) -> bool:
    return not stage.watch and all(isinstance(term, ModelReward) for term in stage.reward)


def _wrong_rewards(recipe: Recipe, name: str, stage: PpoSettings) -> Iterator[Problem]:
    for key, terms in (("reward", stage.reward), ("watch", stage.watch)):
        what = f"stage '{name}': its {'watched ' if key == 'watch' else ''}reward"
        models: set[str] = set()
        for index, term in enumerate(terms):
            place = ("stages", name, key, index)
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


def _wrong_value(recipe: Recipe, name: str, stage: PpoSettings) -> Iterator[Problem]:
    if stage.value.kind == "adapter" and trains_adapter(recipe, name) is False:
        yield Problem(
            ("stages", name, "value", "kind"),
            f"stage '{name}' trains all weights of its policy, so its value model can be no adapter on the same base.",
            "Set value: model or trunk, or give the stage an `adapter:`.",
        )


def _wrong_start(recipe: Recipe, name: str, stage: Stage) -> Iterator[Problem]:
    upstream = next((above for above in _chain(recipe, stage.from_) if isinstance(above, RewardSettings)), None)
    place = ("stages", name, "from")
    if upstream and isinstance(stage, TrainingSettings) and not isinstance(stage, RewardSettings):
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


def _wrong_adapter(recipe: Recipe, name: str, stage: TrainingSettings) -> Iterator[Problem]:
    place = ("stages", name)
    if stage.adapter and gives_adapter(recipe, stage.from_):
        yield Problem(
            (*place, "adapter"),
            f"stage '{name}' starts from an adapter ('{stage.from_}'), and training goes on with the adapter it starts from.",
            "Leave the block out, or put a merge stage between the two.",
            at_key=True,
        )
    if stage.quantize and not stage.adapter and gives_adapter(recipe, stage.from_) is False and stage.from_:
        yield Problem(
            (*place, "quantize"),
            f"stage '{name}' quantizes the model of '{stage.from_}', which freezes it, so it needs an 'adapter'.",
            "Add for example `adapter: {rank: 16}`.",
        )
    if stage.adapter and stage.adapter.init == "pissa" and stage.quantize:
        yield Problem(
            (*place, "adapter", "init"),
            "pissa starts from the singular values of unquantized weights, so it cannot go with 'quantize'.",
            "Leave out `init` or `quantize`.",
        )
