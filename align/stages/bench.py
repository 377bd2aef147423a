"""What every stage that trains a policy is measured with: its answers to held-out questions, and their judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from align.chat.templates import stop_token_ids
from align.data.examples import Question, prompt_of
from align.evaluation.numbers import as_metrics, judge_changes, judge_numbers
from align.progress import Progress
from align.rollout.generation import Reply, Sampling, generate
from align.stages.stage import Inputs

if TYPE_CHECKING:
    from align.judge import Verdict
    from align.stages.encoding import Desk


@dataclass
class Answers:
    """Questions, the prompts they became, and what a model replied; verdicts where there is a judge."""

    asked: Sequence[Question] = ()
    prompts: Sequence[list[int]] = ()
    replies: Sequence[Reply] = ()
    verdicts: Sequence[Verdict] = ()

    @property
    def expected(self) -> list[Any]:
        """What each question's row says about a right answer."""
        return [question.expected for question in self.asked]


@dataclass(frozen=True)
class Bench:
    """The held-out questions of one stage, and how they are asked."""

    desk: Desk
    inputs: Inputs
    progress: Progress

    def answers(self, model: nn.Module, *, temperature: float = 0.0) -> Answers:
        """The model's answers to the held-out questions, greedy or sampled, and what the judge says of them."""
        evaluation = self.inputs.evaluation
        asked, prompts = self._questions()
        if not asked:
            return Answers()
        sampling = Sampling(max_new_tokens=evaluation.max_new_tokens, temperature=temperature, seed=self.inputs.seed)
        tokenizer = self.desk.tokenizer
        stops = stop_token_ids(tokenizer)
        replies = generate(model, tokenizer, prompts, sampling, stop_ids=stops, progress=self.progress)
        judge = self.inputs.judge
        verdicts = [
            judge.verdict(prompt_of(question)[-1].content, reply.text, question.expected)
            for question, reply in zip(asked, replies, strict=True)
            if judge is not None
        ]
        return Answers(asked, prompts, replies, verdicts)

    def _questions(self) -> tuple[list[Question], list[list[int]]]:
        """The first `evaluation.rows` questions that leave room for an answer, and their prompts as ids."""
        evaluation = self.inputs.evaluation
        room = self.desk.context - evaluation.max_new_tokens
        asked: list[Question] = []
        prompts: list[list[int]] = []
        for question in self.inputs.questions:
            if len(asked) == evaluation.rows:
                break
            prompt = self.desk.encoder.prompt(prompt_of(question))
            if len(prompt) <= room:
                asked.append(question)
                prompts.append(prompt)
        return asked, prompts


def judged(before: Answers, after: Answers) -> dict[str, Any]:
    """The judge's numbers before and after, and the paired differences; {} without a judge."""
    broken = {name for answers in (before, after) for verdict in answers.verdicts for name in verdict.violations}
    first, last = (judge_numbers(some.verdicts, some.expected, principles=sorted(broken)) for some in (before, after))
    return {
        **as_metrics(first, "before.judge."),
        **as_metrics(last, "after.judge."),
        **as_metrics(judge_changes(before.verdicts, after.verdicts), "change.judge."),
    }


def samples(before: Answers, after: Answers, count: int) -> list[dict[str, Any]]:
    """Answers of parent and child to the first questions, for the report."""
    shown = []
    for number, question in enumerate(after.asked[:count]):
        row: dict[str, Any] = {
            "prompt": prompt_of(question)[-1].content,
            "before": before.replies[number].text,
            "after": after.replies[number].text,
        }
        if after.verdicts:
            row["before_verdict"] = asdict(before.verdicts[number])
            row["after_verdict"] = asdict(after.verdicts[number])
        shown.append(row)
    return shown
