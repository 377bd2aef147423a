"""Signs in the log of a training that it went wrong, though nothing failed: a loss better than chance before anything was
learnt, a gradient that is nothing or explodes, a loss that ends above where it began. Policies have their own (ppo/guards).

Only numbers are looked at, so none of this is proof: who shows them says that they are signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Series = Sequence[tuple[int, float]]  # step and value, in the order of the steps

EXPLODED = 100.0  # times the median gradient norm before clipping
ROSE = 1.5  # times the first loss
OFF_CHANCE = 0.01  # nats; log 2 is what a reference says of itself, whatever the model
TOLD_APART = 0.5  # of log 2: a head that knows nothing is above it
NOTHING_LEFT = 1e-4  # nats per token
INDIFFERENT = ("sigmoid", "robust")  # losses of dpo that are log 2 where policy and reference agree


def signs(kind: str, settings: Mapping[str, Any], log: Mapping[str, Series]) -> dict[str, str]:
    """Name of each sign -> the sentence for people. log: `train.loss` and `train.grad_norm` of one run so far."""
    loss, norm = _finite(log.get("train.loss", ())), _finite(log.get("train.grad_norm", ()))
    rose = kind != "ppo" and len(loss) > 1 and loss[-1][1] > ROSE * max(loss[0][1], NOTHING_LEFT)
    found = {
        "start": _of_the_start(kind, settings, loss),
        "gradient": _of_the_gradient(norm),
        "loss": f"The training loss went from {loss[0][1]:.3g} to {loss[-1][1]:.3g}: lower learning_rate."
        if rose
        else "",
    }
    return {name: sentence for name, sentence in found.items() if sentence}


def _of_the_start(kind: str, settings: Mapping[str, Any], loss: Series) -> str:
    """Of the first logged step, which is the first step: what it says is that of weights that have learnt nothing yet."""
    if not loss or loss[0][0] > 1:
        return ""
    chance, first = math.log(2), loss[0][1]
    if kind == "dpo" and _loss_kind(settings) in INDIFFERENT and abs(first - chance) > OFF_CHANCE:
        return f"The first loss is {first:.4f} and not log 2 = {chance:.4f}: the policy did not start out equal to its reference."
    if kind == "reward" and first < TOLD_APART * chance:
        return (
            f"The first loss is {first:.3f}, far below chance (log 2 = {chance:.3f}): the pairs were told apart before "
            "anything was learnt. Does something other than quality give the chosen answers away, or was it trained before?"
        )
    if kind in ("sft", "pretrain") and first < NOTHING_LEFT:
        return f"The first loss is {first:.2g}: there was nothing to learn. Do the rows have labels, or were they trained on?"
    return ""


def _of_the_gradient(norm: Series) -> str:
    if not norm:
        return ""
    values = [value for _, value in norm]
    if not any(values):
        return "The gradient was 0 at every logged step: nothing was learnt."
    usual = median(values)
    step, worst = max(norm, key=lambda entry: entry[1])
    if usual > 0 and worst > EXPLODED * usual:
        return (
            f"The gradient norm reached {worst:.3g} at step {step}, where {usual:.3g} is usual: it exploded. "
            "Look at the rows of that step, or lower learning_rate."
        )
    return ""


def _loss_kind(settings: Mapping[str, Any]) -> str:
    loss = settings.get("loss", "sigmoid")
    return str(loss.get("kind", "sigmoid")) if isinstance(loss, Mapping) else str(loss)


def _finite(series: Series) -> Series:
    return [(step, value) for step, value in series if math.isfinite(value)]
