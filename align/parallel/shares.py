"""Which rows of an optimiser step go to which process. Every process knows all lengths, so nobody has to ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Groups = list[list[int]]


def shares(lengths: Sequence[int], processes: int) -> Groups:
    """Indices of the rows of each process: the longest first, each to whoever has the fewest tokens so far.

    Each index occurs exactly once, in the rows' order; a process may get none. The largest share is within the longest row
    of the smallest.
    """
    parts: Groups = [[] for _ in range(processes)]
    tokens = [0] * processes
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = tokens.index(min(tokens))
        parts[least].append(index)
        tokens[least] += lengths[index]
    return [sorted(part) for part in parts]


def groups_of_all(lengths: Sequence[int], processes: int, group: Callable[[list[int]], Groups]) -> list[Groups]:
    """The micro-batches of each process. group: lengths -> indices that go through the model together."""
    return [
        [[part[place] for place in places] for places in group([lengths[index] for index in part])]
        for part in shares(lengths, processes)
    ]
