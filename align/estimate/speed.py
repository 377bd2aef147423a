"""Predicted time of a stage: its multiplications and additions, by the speed of a matrix product here and now.

A first estimate, of processors alone. Held-out measurements are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache

import numpy as np

from align.estimate.critique import request_tokens
from align.estimate.ppo import Scorer, value_kind
from align.estimate.rows import Rows
from align.estimate.shape import Shape
from align.recipe.critique_settings import CritiqueWork
from align.recipe.ppo_settings import PpoSettings
from align.recipe.training_settings import TrainingSettings

REACHED = 0.25  # share of the processor's matrix speed that a training step reaches
RECOMPUTED = 4 / 3  # of the work of a step, with gradient checkpointing


def training_seconds(settings: TrainingSettings, shape: Shape, rows: Rows) -> float:
    """Of all optimiser steps. What the two sides of a pair share is computed once."""
    tokens = settings.rows_seen(rows.count) * rows.mean * rows.computed
    return _seconds(_passes(settings) * shape.parameters * tokens)


def ppo_seconds(settings: PpoSettings, shape: Shape, rows: Rows, scorers: Sequence[Scorer]) -> float:
    """Of all rounds: every response is generated once, scored by every role, and learnt from `round_epochs` times."""
    own_value = value_kind(settings) in ("adapter", "model")
    learning = _passes(settings) * settings.round_epochs * (2 if own_value else 1)
    scoring = 2 * (3 if own_value else 2)  # policy, reference, value
    work = (2 + scoring + learning) * shape.parameters + 2 * sum(one.shape.parameters for one in scorers)
    return _seconds(_rounds(settings, rows) * settings.rollouts * (rows.prompt + settings.max_new_tokens) * work)


def critique_seconds(settings: CritiqueWork, shape: Shape, rows: Rows) -> float:
    """Of all answers and requests, each as long as it may be."""
    contests = settings.panel * settings.samples * (settings.samples - 1) + 2 * settings.check_revisions
    requests = (2 * settings.revisions + contests) * request_tokens(settings, rows.prompt)
    answers = max(settings.samples, 1) * (rows.prompt + settings.max_new_tokens)
    return _seconds(2 * rows.count * (answers + requests) * shape.parameters)


def _passes(settings: TrainingSettings) -> float:
    """Operations per weight and token of a step: a frozen weight needs no gradient."""
    return (4 if settings.adapter else 6) * (RECOMPUTED if settings.gradient_checkpointing else 1)


def _rounds(settings: PpoSettings, rows: Rows) -> float:
    rounds = settings.rounds or math.ceil(settings.epochs * rows.count * settings.samples / settings.rollouts)
    steps = settings.round_epochs * math.ceil(settings.rollouts / settings.batch_size)
    return min(rounds, settings.max_steps / steps) if settings.max_steps else rounds


def _seconds(work: float) -> float:
    return work / (REACHED * matrix_speed())


@cache
def matrix_speed(size: int = 512) -> float:
    """Floating-point operations per second of a float32 matrix product here and now, the best of three."""
    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
