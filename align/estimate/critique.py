"""Peak memory of a critique stage: models that write, and what they write with."""

from __future__ import annotations

from align.estimate.activations import FLOAT
from align.estimate.asking import reading_bytes, writing_bytes
from align.estimate.place import WRITERS_BYTES, Place
from align.estimate.rows import Rows
from align.estimate.shape import Shape
from align.estimate.weights import frozen_bytes, fused_bytes
from align.recipe.critique_settings import CheckpointCritic, CritiqueWork

FORM_TOKENS = 60  # of a request besides the prompt and the answers in it


def critique_bytes(
    settings: CritiqueWork,
    shape: Shape,
    rows: Rows,
    place: Place,
    *,
    quantize: str | None,
    adapter: int | None,
    half: bool,
) -> float:
    """Peak of a stage whose critic is as large as the model that it starts from, or is not here at all.

    rows: all prompts that are answered, held-out ones too. adapter: weights of the one on the model, if it has one.
    """
    new = settings.max_new_tokens
    request = request_tokens(settings, rows.longest_prompt)
    own = frozen_bytes(shape, quantize, half=half) + FLOAT * (adapter or 0)
    models = 2 if isinstance(settings.critic, CheckpointCritic) else 1
    fused = fused_bytes(shape, half=half, adapted=adapter is not None, quantize=quantize)
    answers = rows.count * max(settings.samples, 1)
    writing = writing_bytes(shape, answers, request - new, new, half=half)
    reading = reading_bytes(shape, rows.count * request, 1 / request, half=half)
    return (0 if place.gpu else WRITERS_BYTES) + models * own + fused + max(writing, reading)


def request_tokens(settings: CritiqueWork, prompt: float) -> float:
    """Tokens of the longest request with its reply: prompt, answer and criticism, and what is written then."""
    return prompt + 2 * settings.max_new_tokens + FORM_TOKENS
