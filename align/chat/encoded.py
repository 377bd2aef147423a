"""What a row is once it is tokens, and the count of what the length policy did to the rows. Made by chat.py."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row. trained[i]: token i is a label (for token 0, which nothing predicts, it has no effect)."""

    ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(self.trained[1:])


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two rows with the same first `prompt_length` tokens. margin and probability are the preference's."""

    chosen: Encoded
    rejected: Encoded
    prompt_length: int
    margin: float | None
    probability: float | None


@dataclass
class LengthReport:
    """What the length policy did. A pair is one row in all counts, and two in `lengths` and the numbers of tokens.

    Left out: dropped, for their length; without_answer, because the cut left nothing to train; equal_pairs, because
    both answers are (or became) the same. Of the rows that are kept: cut at their end; cut_without_stop, so that a turn
    lost its stop token; cut_prompts from the left. untrainable_turns: assistant turns that the template shows otherwise
    than it asked for them, and that are not trained.
    """

    rows: int = 0
    dropped: int = 0
    cut: int = 0
    cut_without_stop: int = 0
    cut_prompts: int = 0
    without_answer: int = 0
    equal_pairs: int = 0
    untrainable_turns: int = 0
    trained_tokens: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, other: LengthReport) -> None:
        """Count what stands in another report, too."""
        self.add_counts(other)
        self.lengths += other.lengths

    def add_counts(self, other: LengthReport) -> None:
        """As `add`, without the lengths of rows."""
        for name, value in other.counts().items():
            setattr(self, name, getattr(self, name) + value)

    def counts(self) -> dict[str, int]:
        """All but the lengths of rows."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def as_dict(self) -> dict[str, int]:
        """The counts, and longest, median and 95th percentile of the rows that were kept, in tokens."""
        ordered = sorted(self.lengths) or [0]
        return self.counts() | {
            "tokens": sum(self.lengths),
            "longest": ordered[-1],
            "p50": ordered[(len(ordered) - 1) // 2],
            "p95": ordered[(len(ordered) - 1) * 95 // 100],
        }
