"""Log-probabilities under a head that is one matrix, with their gradients worked out by hand.

With p the softmax of the logits W h and t the target, the gradient of log p_t by h is (1 - p_t) W_t less the sum of
p_v W_v over all other v. So the forward pass turns its logits into those p, in place, and multiplies them with W at once;
what is left for the backward pass is to scale what that gave, and one product more where W itself is trained. Nothing else of size (M, V)
is made or kept, and rounding p to bfloat16 takes nothing from 1 - p_t where the model is sure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 2**18  # numbers that a CPU works on at a time: 1 MB in float32, which stays in its cache


def is_plain(head: nn.Module) -> bool:
    """Whether the logits are the hidden state times one matrix that torch holds as numbers: no bias, no hook, no adapter."""
    watched = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter and not watched


def plain_logps(
    hidden: Tensor, matrix: Tensor, targets: Tensor, temperature: float, space: Tensor, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) of `targets` and entropies (M,) where asked, else zeros; float32, without gradients.

    hidden: (M, H). matrix: the head's weight (V, H), as compute_weight gives it. space: at least M x V numbers of its kind,
    which are overwritten.
    """
    return _softmax(_logits(hidden, matrix, space), targets, temperature, entropy=entropy)


class PlainLogps(torch.autograd.Function):
    """`apply(hidden, weight, matrix, targets, temperature, space)`: log-probabilities (M,), float32, as of plain_logps.

    weight: the head's own, which gets the gradient. matrix: it again, in the arithmetic of the products. space: None where
    the weight trains, whose gradient needs what is computed in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        matrix: Tensor,
        targets: Tensor,
        temperature: float,
        space: Tensor | None,
    ) -> Tensor:
        others = _logits(hidden, matrix, space)
        logps, _ = _softmax(others, targets, temperature, keep=True)
        pushed = others @ matrix
        ctx.save_for_backward(hidden, weight, targets, logps, pushed, others if weight.requires_grad else None)
        ctx.temperature = temperature
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, targets, logps, pushed, others = ctx.saved_tensors
        scale = (gradient / ctx.temperature)[:, None]
        missing = -torch.expm1(logps)[:, None] * scale  # 1 - p_t, exact where p_t is near 1
        by_hidden = by_weight = None
        if ctx.needs_input_grad[0]:
            by_hidden = (missing * weight[targets] - scale * pushed).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            states = hidden.float()
            by_weight = (others.t() @ (-scale * states).to(others.dtype)).to(weight.dtype)
            by_weight.index_add_(0, targets, (missing * states).to(weight.dtype))
        return by_hidden, by_weight, None, None, None, None


def compute_weight(weight: Tensor) -> Tensor:
    """A head's weight in the arithmetic of its products: autocast's, where that is on."""
    place = weight.device.type
    return weight.detach().to(torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else weight.dtype)


def _logits(hidden: Tensor, matrix: Tensor, space: Tensor | None) -> Tensor:
    states = hidden.to(matrix.dtype)
    return states @ matrix.t() if space is None else torch.mm(states, matrix.t(), out=space[: len(states)])


def _softmax(
    logits: Tensor, targets: Tensor, temperature: float, *, keep: bool = False, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, as of plain_logps. keep: the logits become the probabilities of all but the target."""
    rows = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    logps, entropies = torch.zeros((2, len(logits)), dtype=torch.float32, device=logits.device)
    rounded = logits.dtype != torch.float32
    space = torch.empty((rows if rounded else 0, logits.shape[1]), dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        part, wanted = logits[here], targets[here, None]
        values = space[: len(part)].copy_(part) if rounded else part
        if temperature != 1:
            values.div_(temperature)
        values.sub_(values.amax(-1, keepdim=True))
        reached = values.gather(1, wanted)
        powers = values.exp() if entropy else values.exp_()
        total = powers.sum(-1, keepdim=True)
        logps[here] = (reached - total.log())[:, 0]
        if entropy:
            entropies[here] = (total.log() - (powers * values).sum(-1, keepdim=True) / total)[:, 0]
        if keep:
            values.div_(total).scatter_(1, wanted, 0.0)
            if rounded:
                part.copy_(values)
    return logps, entropies
