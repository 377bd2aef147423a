"""A model that is asked and not trained: where its inputs go, what it takes, and how it is left as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients inside; every module's mode as it was after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs have to be."""
    return next(model.parameters()).device


def innermost(model: nn.Module) -> Any:
    """The model below its adapters, whose wrappers hide what forward takes."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def taken_by(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the model's forward knows by name."""
    known = _parameters(type(innermost(model)).forward)
    return {name: value for name, value in options.items() if name in known}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
