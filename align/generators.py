"""The random generators that dropout and noise draw from, put back so that a step can be made once more."""

from __future__ import annotations

from collections.abc import Callable

import torch


def generators_now() -> Callable[[], None]:
    """A call that puts torch's generators, that of the accelerator too, back to where they are now."""
    own = torch.random.get_rng_state()
    accelerated = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put_back() -> None:
        torch.random.set_rng_state(own)
        if accelerated is not None:
            torch.cuda.set_rng_state(accelerated)

    return put_back
