"""Prompts -> rows: answers, critiques, revisions and comparisons, a group of prompts at a time, each row durable.

A group is always the same prompts, and what is drawn for it depends on the seed and its place alone, so that a run that
was stopped goes on to the very rows of one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from align.constitution import Constitution
from align.critique.comparing import compare
from align.critique.critics import Critic
from align.critique.revising import revise
from align.critique.rows import Row, RowFile
from align.critique.writers import EndpointWriter, in_threads
from align.critique.writing import Writer
from align.data.examples import Question, prompt_of
from align.errors import Interrupted
from align.progress import Bar, Progress
from align.recipe.critique_settings import CritiqueWork
from align.stopping import stop_requested, stops_at_boundary

ROWS_AT_ONCE = 256  # prompts of a group: enough to keep a batch full, few enough to lose little at a stop


@dataclass(frozen=True)
class Workbench:
    """Who answers, who criticises, and by what. endpoint: the critic's, whose rows are made one by one, many at once."""

    settings: CritiqueWork
    policy: Writer
    critic: Critic
    constitution: Constitution
    seed: int
    endpoint: EndpointWriter | None
    progress: Progress

    def rows(self, questions: Sequence[Question], file: RowFile, what: str) -> list[Row]:
        """A row for each question that leaves room for an answer, in their order; those in the file are not made again.

        Raises Interrupted at the next row or group when a signal asked to stop; what is finished is in the file.
        """
        with self.progress.bar(what, len(questions)) as bar, stops_at_boundary():
            bar.advance(len(file.rows))
            for start in range(0, len(questions), ROWS_AT_ONCE):
                group = questions[start : start + ROWS_AT_ONCE]
                if any(start + place not in file.rows for place in range(len(group))):
                    stopped_if_asked()
                    self._make(start, group, file, bar)
        return file.in_order()

    def _make(self, start: int, group: Sequence[Question], file: RowFile, bar: Bar) -> None:
        rows = self._answered(start, group)
        missing = [row for row in rows if row.index not in file.rows]
        if self.endpoint:

            def finish(row: Row) -> None:
                stopped_if_asked()
                self._criticise([row])
                file.add([row])
                bar.advance(1)

            in_threads(finish, missing, self.endpoint.threads, self.endpoint.close)
        else:  # all of them, also those on file: in another batch the last bits might differ
            self._criticise(rows)
            file.add(rows)
            bar.advance(len(missing))

    def _answered(self, start: int, group: Sequence[Question]) -> list[Row]:
        """Rows with sampled answers; a prompt that leaves no room for one is a row that is kept apart."""
        prompts = [prompt_of(question) for question in group]
        samples = max(self.settings.samples, 1)
        written = self.policy.write(
            [prompt for prompt in prompts for _ in range(samples)], self.settings.max_new_tokens,
            temperature=self.settings.temperature, seed=seed_of(self.seed, start),
        )  # fmt: skip
        rows = []
        for place, (question, prompt) in enumerate(zip(group, prompts, strict=True)):
            answers = written[place * samples : (place + 1) * samples]
            texts = [answer.text if answer and answer.finished else "" for answer in answers]
            row = Row(start + place, prompt, texts, question.expected)
            if answers[0] is None:
                row.fault = "too_long"
            elif not answers[0].finished:
                row.fault, row.final = "unfinished", answers[0].text
            elif not texts[0]:
                row.fault = "unanswered"
            rows.append(row)
        return rows

    def _criticise(self, rows: Sequence[Row]) -> None:
        settings = self.settings
        if settings.revisions:
            revise(
                rows, self.critic, self.constitution,
                rounds=settings.revisions, seed=self.seed, check=settings.check_revisions,
            )  # fmt: skip
        if settings.samples:
            compare(
                rows, self.critic, self.constitution,
                panel=settings.panel, most_confident=settings.most_confident, seed=self.seed,
            )  # fmt: skip


def seed_of(seed: int, start: int) -> int:
    """Seed of the answers to the group of prompts that begins at `start`."""
    return int.from_bytes(hashlib.sha256(f"{seed} answers {start}".encode()).digest()[:6], "big")


def stopped_if_asked() -> None:
    """Raises Interrupted when a signal asked to stop."""
    if number := stop_requested():
        raise Interrupted(number, "stopped; finished rows are saved", "The same command goes on from there.")
