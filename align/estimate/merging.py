"""Peak memory of a merge stage: the adapter on its base beside the merged model, and both models' log-probabilities."""

from __future__ import annotations

from align.estimate.activations import FLOAT
from align.estimate.place import Place
from align.estimate.rows import Rows
from align.estimate.shape import Shape
from align.estimate.weights import frozen_bytes

DOUBLE = 8  # bytes
TABLES = 5  # of log-probabilities in float64, one for each token of a row and each of the vocabulary, at the same time


def merge_bytes(shape: Shape, rows: Rows, place: Place, *, quantize: str | None, adapter: int, half: bool) -> float:
    """Peak of writing the merged model in float32, and of comparing it on the longest of the rows. adapter: weights."""
    base = frozen_bytes(shape, quantize, half=half)
    written = FLOAT * shape.parameters
    writing = written + (base if quantize else 0.0)
    read_back = frozen_bytes(shape, None, half=half)
    comparing = base + FLOAT * adapter + read_back + TABLES * DOUBLE * rows.longest * shape.vocabulary
    return place.libraries_bytes + max(writing, comparing)
