"""Log-probabilities of the tokens that rows train, by the leanest way that the architecture allows.

Lean: rows go through the trunk without padding (trunk.py), and the head sees nothing but the places that predict a trained
token, a chunk at a time (head.py), so no (B, T, V) tensor is ever made. Else (its logits are more than its head on its
last hidden state, or noise is put on embeddings whose size goes by the row's length): padded rows and all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from align.batches import pad
from align.chat.encoded import Encoded
from align.errors import AlignError
from align.losses import token_logps
from align.models.head import check_head, target_logps
from align.models.trunk import hidden_states, inner_model, needs_no_padding

PAD_ID = 0  # any id will do: the attention mask hides it
_lean: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TrainedLogps(NamedTuple):
    """Of all trained tokens, row after row: log-probabilities (M,), float32, and the row of each, (M,)."""

    logps: Tensor
    row: Tensor
    rows: int

    def sums(self) -> Tensor:
        """Of each row, (B,)."""
        return self.logps.new_zeros(self.rows).index_add(0, self.row, self.logps)


def trained_logps(model: nn.Module, rows: Sequence[Encoded]) -> TrainedLogps:
    """Log-probability of each trained token given those before it; the first token of a row has none."""
    place = next(model.parameters()).device
    owners = [number for number, row in enumerate(rows) for _ in range(row.labels)]
    row_of = torch.tensor(owners, dtype=torch.long, device=place)
    if not is_lean(model):
        return TrainedLogps(_from_all_logits(model, rows, place), row_of, len(rows))
    before, targets, start = [], [], 0
    for row in rows:
        labels = [at for at in range(1, len(row.ids)) if row.trained[at]]
        before += [start + at - 1 for at in labels]
        targets += [row.ids[at] for at in labels]
        start += len(row.ids)
    places = torch.tensor(before, dtype=torch.long, device=place)
    states = hidden_states(model, [row.ids for row in rows], places)
    logps, _ = target_logps(model, states, torch.tensor(targets, dtype=torch.long, device=place))
    return TrainedLogps(logps, row_of, len(rows))


def is_lean(model: nn.Module) -> bool:
    """Whether rows of this model need no padding and no full logits; found out once for each model."""
    inner = inner_model(model)
    if inner not in _lean:
        _lean[inner] = _fits(model)
    return _lean[inner] and not getattr(model, "neftune_noise_alpha", None) and not _has_noise(inner)


def is_padded(model: nn.Module) -> bool:
    """Whether rows go through this model padded to the longest, so that a batch costs rows x longest and not its tokens.

    model: a language model, a classifier, or the roles of ppo, whose policy counts.
    """
    model = getattr(model, "policy", model)
    if not needs_no_padding(model):
        return True
    return inner_model(model).get_output_embeddings() is not None and not is_lean(model)


def _fits(model: nn.Module) -> bool:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            check_head(model)
    except (AlignError, AttributeError, TypeError, RuntimeError):
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return True


def _has_noise(inner: Any) -> bool:
    """Whether NEFTune's hook is on the embeddings, whose noise shrinks with the length of what goes through together."""
    return getattr(inner.get_input_embeddings(), "neftune_noise_alpha", None) is not None


def _from_all_logits(model: nn.Module, rows: Sequence[Encoded], place: torch.device) -> Tensor:
    batch = pad(rows, PAD_ID).to(place)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return token_logps(logits, batch.input_ids, batch.trained)[batch.trained[:, 1:]]
