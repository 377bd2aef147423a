"""The responses of one round with all that learning needs of them, and the micro-batches cut from it.

B: responses of the round (of a micro-batch: some of them), R: tokens of the longest one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS = ("old_logps", "reference_logps", "values", "advantages", "returns", "weights")
_FILES = ("round.json", "round.safetensors")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompts and responses as token ids, and where among them stands what predicts a response's token.

    rows: prompt and response together. places: (M,), among all tokens of the rows, one row after the other: of each
    response token the one before it. targets: (M,), the response tokens. mask: (B, R), true at real response tokens.
    """

    rows: list[list[int]]
    places: Tensor
    targets: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[list[int]], responses: Sequence[list[int]], place: torch.device) -> Tokens:
        """Neither prompts nor responses may be empty."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        lengths = torch.tensor([len(response) for response in responses])
        starts = torch.tensor([len(row) for row in rows]).cumsum(0) - lengths - 1
        places = torch.cat([start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)])
        targets = torch.tensor([token for response in responses for token in response])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return cls(rows, places.to(place), targets.to(place), mask.to(place))

    def table(self, values: Tensor) -> Tensor:
        """(M,) values as (B, R), 0 where there is no token; gradients pass."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)


@dataclass(frozen=True)
class Round:
    """One round. All tensors are (B, R), float32, on the CPU; 0 where there is no token.

    old_logps: log-probabilities under the policy that wrote the responses. weights: importance weights, 1 where the
    engine is exact.
    """

    number: int
    prompts: list[list[int]]
    responses: list[list[int]]
    old_logps: Tensor
    reference_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor

    def length(self, place: int) -> int:
        """Tokens of one prompt with its response."""
        return len(self.prompts[place]) + len(self.responses[place])

    def tokens(self, places: Sequence[int], device: torch.device) -> Tokens:
        """Some responses, ready for the model."""
        return Tokens.of([self.prompts[i] for i in places], [self.responses[i] for i in places], device)

    def columns(self, places: Sequence[int], mask: Tensor) -> dict[str, Tensor]:
        """The tensors of those responses, cut to the width of their mask, where that is."""
        chosen = list(places)
        return {name: getattr(self, name)[chosen, : mask.shape[1]].to(mask.device) for name in TENSORS}

    def save(self, folder: Path) -> None:
        """Writes it into a folder."""
        text = {"number": self.number, "prompts": self.prompts, "responses": self.responses}
        (folder / _FILES[0]).write_text(json.dumps(text), encoding="utf-8")
        save_file({name: getattr(self, name).contiguous() for name in TENSORS}, folder / _FILES[1])

    @classmethod
    def load(cls, folder: Path) -> Round:
        """Reads what `save` wrote."""
        text = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
        return cls(text["number"], text["prompts"], text["responses"], **load_file(folder / _FILES[1]))
