"""What can be said of the models of a recipe before one is loaded: weights that are not finite, tokens without a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.recipe.graph import reward_references, topological_order
from align.recipe.settings import PretrainSettings, Stage

if TYPE_CHECKING:
    from align.models.source import Source
    from align.origins import Origin, Weights, Workshop


def check_weights(workshop: Workshop, name: str) -> None:
    """Raises AlignError for weights that are not finite in a model that a stage works on and that is there already."""
    from align.models.finite import require_finite_weights

    for origin in _origins(workshop, name):
        for source in dict.fromkeys((origin.source.root, origin.source)):
            try:
                require_finite_weights(source)
            except AlignError as error:
                error.message = f"stage '{name}': {error.message}"
                raise


def model_warnings(workshop: Workshop) -> list[str]:
    """Sentences about the models of a recipe that are there already, each once."""
    names = topological_order(workshop.recipe)
    return list(dict.fromkeys(one for name in names for one in _tokens_without_rows(_origins(workshop, name))))


def stage_warnings(stage: Stage, weights: Weights) -> list[str]:
    """As `model_warnings`, of the models that a stage works on, now that all of them have been made."""
    start = [] if _makes_its_own(stage) else [weights.start]
    return _tokens_without_rows([*start, *weights.rewards.values(), *([weights.critic] if weights.critic else [])])


def _origins(workshop: Workshop, name: str) -> Sequence[Origin]:
    """The models that a stage loads weights of, as far as they are there."""
    stage, recipe = workshop.stage(name), workshop.recipe
    rewards = [one for one in reward_references(stage) if one not in recipe.stages]
    found = [
        None if _makes_its_own(stage) else workshop.starting_point(name, {}),
        *(workshop.reward_point(name, reference) for reference in rewards),
        workshop.critic_point(name, {}),
    ]
    return [origin for origin in found if origin is not None]


def _makes_its_own(stage: Stage) -> bool:
    return isinstance(stage, PretrainSettings) and stage.from_scratch


def _tokens_without_rows(origins: Iterable[Origin]) -> list[str]:
    """Warnings of tokenizers with more tokens than their models. Tokens that we add come later, and have been trained
    wherever one of our checkpoints has them."""
    found = []
    for origin in origins:
        tokens, rows = _tokens_and_rows(origin.source)
        if tokens > rows:
            found.append(
                f"{origin.name}: its tokenizer has {tokens} tokens and the model knows {rows}; the rows of the other "
                f"{tokens - rows} are made up (the mean of those it has). Do the two belong together?"
            )
    return list(dict.fromkeys(found))


def _tokens_and_rows(source: Source) -> tuple[int, int]:
    from align.models.folders import load_tokenizer, model_config
    from align.models.source import saved_vocabulary

    rows = int(model_config(source).get_text_config().vocab_size)
    return len(load_tokenizer(source)), max(rows, saved_vocabulary(source) if source.is_adapter else 0)
