"""A reward that is a Python function of the user's: imported when the stage begins, called once for each round."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.errors import AlignError, did_you_mean
from align.progress import Progress
from align.rewards.response import Response, Reward

SIGNATURE = "f(prompts: list[str], responses: list[str], expected: list[dict | None]) -> list[float]"


class Function(Reward):
    """f(prompts, responses, expected): texts of the prompts' last turns, texts of the responses, what the data say."""

    def __init__(self, name: str) -> None:
        """name: module:function. Raises AlignError when there is no such thing, or it takes other arguments."""
        self.function = _imported(name)
        _check_arguments(self.function)

    def __call__(self, responses: Sequence[Response], progress: Progress) -> Sequence[object]:
        expected = [copy.deepcopy(dict(r.expected)) if r.expected is not None else None for r in responses]
        try:
            values = self.function([r.question for r in responses], [r.text for r in responses], expected)
        except (Exception, SystemExit) as error:
            raise AlignError(f"it raised {_described(error)}", _place(error)) from error
        listed = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
        if not isinstance(listed, list | tuple):
            raise AlignError(f"it returned a {type(values).__name__}, not a list of numbers", f"Write {SIGNATURE}.")
        return listed


def _imported(name: str) -> Callable[..., Any]:
    """What `module:function` names, with the working folder on the path, as for `python -m`."""
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise AlignError(
                f"there is no module '{error.name}'", f"It is looked for in {Path.cwd()} and among what is installed."
            ) from None
        raise AlignError(f"importing '{module_name}' raised {_described(error)}", _place(error)) from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise AlignError(f"module '{module_name}' has no function '{attribute}'", did_you_mean(attribute, functions))
    return function


def _check_arguments(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # builtins do not say
        return
    try:
        signature.bind([], [], [])
    except TypeError:
        raise AlignError(f"it takes {signature}, not (prompts, responses, expected)", f"Write {SIGNATURE}.") from None


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _place(error: BaseException) -> str:
    """Where the error came from, as a hint; an error of syntax says it itself."""
    if isinstance(error, SyntaxError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"In {last.filename}, line {last.lineno}."
