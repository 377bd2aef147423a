"""Proximal policy optimisation, and critic-free estimators on the same loop. The reference is where the stage starts.

What happens in a round stands in ppo/collection.py, the loss in ppo/objective.py, the roles in models/roles.py. Here
they are opened, proved at step 0, trained and measured on held-out prompts, before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.advantages import KlController, RunningMoments
from align.chat.templates import prepare_tokenizer, stop_token_ids
from align.data.examples import Document, Question, prompt_of
from align.errors import AlignError
from align.evaluation.intervals import mean, paired_difference, transformed, wilson
from align.evaluation.numbers import as_metrics, kl_numbers, likelihood_numbers
from align.memory import Budget
from align.models.adapters import fits_policy, put_reward_adapter
from align.models.folders import load_tokenizer
from align.models.hardware import compute_dtype, width_of
from align.models.roles import AdapterReward, RoleOpener, Roles
from align.models.saving import save_checkpoint
from align.models.source import Source
from align.ppo.collection import Collector, Controls
from align.ppo.encoding import encoded_prompts
from align.ppo.objective import PpoLoss
from align.ppo.prompts import RoundStream, rounds_of
from align.ppo.proof import Proof, outside_scores, probe_texts
from align.progress import Progress
from align.recipe.ppo_settings import ModelReward, PpoSettings
from align.rewards.model import RewardModel, context_encoder
from align.rewards.response import Response
from align.rewards.total import Rewards, Scored, build_rewards
from align.rollout.engine import Engine, LocalEngine
from align.rollout.inference import device_of
from align.rollout.scoring import answer_logps, reply_row
from align.rollout.vllm import VllmEngine
from align.stages.bench import Answers, Bench, judged, samples
from align.stages.encoding import Desk
from align.stages.stage import Inputs, Outcome
from align.steps import autocast
from align.trainer import Task, train

EXAMS = 5  # held-out measurements in a run, besides the one at its end
GRAM = 3  # tokens


def run(settings: PpoSettings, inputs: Inputs, folder: Path, progress: Progress) -> Outcome:
    """Train on the prompts of `inputs.data` against the rewards of the recipe."""
    stage = _Ppo(settings, inputs, Desk.open(settings, inputs.parent, inputs.template), progress)
    prompts, lengths = stage.prompts()
    sources = stage.reward_sources()
    probes = probe_texts([prompt.question for prompt in prompts])
    outside = outside_scores(sources, probes)
    roles = stage.open()
    models = stage.reward_models(roles, sources)
    proof = Proof(compute_dtype(settings.precision, width_of(roles.config)) == torch.float32)
    proof.rewards_inside(outside, {name: model.score(probes) for name, model in models.items()})
    rewards, watched = (
        build_rewards(terms, models=models, judges=inputs.judges) for terms in (settings.reward, settings.watch)
    )
    for some in (rewards, watched):
        some.check([prompt.question for prompt in prompts])
    exams = _Exams(stage, rewards, watched)
    before = exams.sit(roles)
    stage.check_room(sources, models, [prompt.question for prompt in prompts], before.answers.asked)
    start = stage.drift(roles, exams.bench)
    controls = Controls(
        KlController(settings.kl_coefficient, settings.kl_target, settings.kl_horizon), RunningMoments()
    )
    budget = Budget.of(settings, progress.note)
    collector = Collector(
        settings, prompts, stage.engine(proof.exact), rewards, watched, controls, budget, inputs.seed, progress
    )
    rounds = rounds_of(len(prompts), settings)
    stream = RoundStream(rounds, settings, inputs.seed)
    exams.plan(before, settings.measure_rounds or math.ceil(len(stream) / stream.steps_per_round / EXAMS))
    objective = PpoLoss(settings, collector, stream.steps_per_round, exams, proof, progress)
    tickets = range(rounds * settings.rollouts)
    task = Task(
        roles,
        objective,
        tickets,
        [],
        settings,
        inputs.seed,
        inputs.work,
        inputs.log_to,
        stream,
        stage.value_rates(roles),
        budget,
    )
    trained = train(task, progress)
    after, end = exams.sit(roles), stage.drift(roles, exams.bench)
    save_checkpoint(roles.policy, stage.desk.tokenizer, folder)
    return Outcome(
        kind="adapter" if settings.adapter or inputs.parent.is_adapter else "model",
        template_sha256=stage.desk.template_sha256,
        metrics={**_compared(before, after, start, end, inputs.seed), **_told(objective), **trained.as_metrics()},
        samples=exams.samples(before, after, objective.journal.exams),
        lengths=lengths,
    )


@dataclass(frozen=True)
class Sitting:
    """Answers to the held-out questions, and what they earned."""

    answers: Answers
    scored: Scored
    watched: Scored


@dataclass(frozen=True)
class Drift:
    """Numbers about answers that were sampled: KL to the reference, perplexity under it, diversity."""

    numbers: dict[str, Any]


@dataclass(frozen=True)
class _Ppo:
    """What the steps of one run share."""

    settings: PpoSettings
    inputs: Inputs
    desk: Desk
    progress: Progress

    def prompts(self) -> tuple[list[Any], dict[str, int]]:
        """Prompts that leave room for a response, and the count of those that do not."""
        questions = [example for example in self.inputs.data.train if not isinstance(example, Document)]
        return encoded_prompts(questions, self.desk.encoder, self.settings, self.desk.max_length)

    def reward_sources(self) -> dict[str, Source]:
        """The reward models of the recipe, by the name it gives them."""
        terms = (*self.settings.reward, *self.settings.watch)
        names = dict.fromkeys(term.from_ for term in terms if isinstance(term, ModelReward))
        return {name: self.inputs.rewards[name].source for name in names}

    def open(self) -> Roles:
        """Policy, reference and value model."""
        first = next((term.from_ for term in self.settings.reward if isinstance(term, ModelReward)), None)
        reward = self.inputs.rewards[first].source if first else None
        return RoleOpener(
            self.settings, self.inputs.parent, reward, self.desk.tokenizer, self.inputs.seed, self.inputs.work
        ).open()

    def reward_models(self, roles: Roles, sources: dict[str, Source]) -> dict[str, RewardModel]:
        """The reward models: as an adapter on the policy's base where one is that, else as models of their own."""
        found = {}
        for number, (name, source) in enumerate(sources.items()):
            if fits_policy(source, roles.policy):
                adapter = f"reward{number}"
                head = put_reward_adapter(roles.policy, adapter, source, trainable=False)
                model = AdapterReward(roles.policy, adapter, head)
                tokenizer = load_tokenizer(source)
                prepare_tokenizer(tokenizer, None)
                found[name] = RewardModel(model, context_encoder(model, tokenizer))
                self.progress.note(f"reward '{name}' is an adapter on the policy's base, and shares it")
            else:
                found[name] = RewardModel.open(source)
        return found

    def check_room(
        self,
        sources: dict[str, Source],
        models: dict[str, RewardModel],
        trained: Sequence[Question],
        held_out: Sequence[Question],
    ) -> None:
        """Raises AlignError where a response may become longer than a reward model of the same tokens can take.

        Its stop token comes on top of a response that was cut off. A reward model of other tokens counts otherwise.
        """
        own = self.desk.tokenizer.get_vocab()
        asked = ((trained, self.settings.max_new_tokens), (held_out, self.inputs.evaluation.max_new_tokens))
        for name, model in models.items():
            same = load_tokenizer(sources[name]).get_vocab() == own
            for questions, new_tokens in asked if same else ():
                try:
                    model.check([prompt_of(question) for question in questions], new_tokens)
                except AlignError as error:
                    error.message = f"reward '{name}': {error.message}"
                    error.hint = "Lower max_length or max_new_tokens (for held-out prompts that of `evaluation:`)."
                    raise

    def engine(self, exact: bool) -> Engine:
        """Who generates. exact: in float32."""
        stops = stop_token_ids(self.desk.tokenizer)
        if self.settings.engine == "local":
            return LocalEngine(self.desk.tokenizer, stops)
        return VllmEngine(
            self.desk.tokenizer, stops, self.inputs.work / "vllm", temperature=self.settings.temperature,
            max_tokens=self.desk.max_length, dtype="float32" if exact else "bfloat16",
        )  # fmt: skip

    def value_rates(self, roles: Roles) -> dict[str, float]:
        """Peak learning rate of each parameter of the value model."""
        return dict.fromkeys(roles.value_names, self.settings.value_learning_rate())

    def drift(self, roles: Roles, bench: Bench) -> Drift:
        """Of answers that the policy samples to the held-out questions: how far they are from the reference."""
        with autocast(roles, self.settings.precision):
            sampled = bench.answers(roles.policy, temperature=1.0)
            rows = [
                reply_row(prompt, reply.ids) for prompt, reply in zip(sampled.prompts, sampled.replies, strict=True)
            ]
            if not rows:
                return Drift({})
            policy = answer_logps(roles.policy, rows, progress=self.progress)
            with roles.reference() as model:
                reference = answer_logps(model, rows, progress=self.progress)
        seed = self.inputs.seed
        loss = likelihood_numbers(reference, seed=seed)["loss"]
        return Drift(
            {
                **kl_numbers(policy, reference, seed=seed),
                "reference_perplexity": transformed(loss, math.exp),
                "length": mean([len(reply.ids) - reply.finished for reply in sampled.replies], seed=seed),
                "finished": wilson(sum(reply.finished for reply in sampled.replies), len(rows)),
                "distinct": distinct([reply.ids for reply in sampled.replies]),
            }
        )


class _Exams:
    """The held-out questions, answered now and then while the policy learns."""

    def __init__(self, stage: _Ppo, rewards: Rewards, watched: Rewards) -> None:
        self.stage, self.rewards, self.watched = stage, rewards, watched
        self.bench = Bench(stage.desk, stage.inputs, stage.progress)
        self.first: Sitting | None = None
        self.every = 1

    def plan(self, first: Sitting, every: int) -> None:
        """`first` is the measurement of round 0; another is due every so many rounds."""
        self.first, self.every = first, every

    def __call__(self, roles: Roles, number: int) -> dict[str, Any]:
        """Numbers of the measurement of a round, with the first answers; {} where none is due."""
        if number % self.every:
            return {}
        sitting = self.first if number == 0 and self.first is not None else self.sit(roles)
        return self._numbers(sitting)

    def sit(self, roles: Roles) -> Sitting:
        """Greedy answers to all held-out questions, judged and rewarded."""
        with autocast(roles, self.stage.settings.precision):
            answers = self.bench.answers(roles.policy)
        responses = [
            Response(
                prompt_of(question), reply.text, len(reply.ids) - reply.finished, reply.finished, question.expected
            )
            for question, reply in zip(answers.asked, answers.replies, strict=True)
        ]
        progress = self.stage.progress
        with torch.autocast(device_of(roles.policy).type, enabled=False):
            return Sitting(answers, self.rewards.score(responses, progress), self.watched.score(responses, progress))

    def samples(self, before: Sitting, after: Sitting, exams: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to the first questions before, after and over time, with their rewards."""
        rows = samples(before.answers, after.answers, self.stage.inputs.evaluation.samples)
        for number, row in enumerate(rows):
            row["before_reward"] = before.scored.totals[number]
            row["after_reward"] = after.scored.totals[number]
            row["over_time"] = [
                {"round": exam["round"], **exam["answers"][number]} for exam in exams
                if number < len(exam["answers"])  # a run that was stopped may go on with more samples
            ]  # fmt: skip
        return rows

    def _numbers(self, sitting: Sitting) -> dict[str, Any]:
        replies, scored = sitting.answers.replies, sitting.scored
        if not replies:
            return {}
        shown = zip(replies[: self.stage.inputs.evaluation.samples], scored.totals)
        numbers: dict[str, Any] = {
            "reward": float(np.mean(scored.totals)),
            "length": float(np.mean([len(reply.ids) - reply.finished for reply in replies])),
            "answers": [{"text": reply.text, "reward": reward} for reply, reward in shown],
        }
        if sitting.answers.verdicts:
            numbers["judge_score"] = float(np.mean([verdict.score for verdict in sitting.answers.verdicts]))
        for name, values in sitting.watched.parts.items():
            numbers |= {f"watch.{name}": float(np.mean(values)), f"watch_std.{name}": float(np.std(values))}
        return numbers


def distinct(replies: Sequence[Sequence[int]]) -> float:
    """Share of distinct runs of three tokens among all of all replies (Li 2016); 1 where there are none."""
    grams = [tuple(reply[start : start + GRAM]) for reply in replies for start in range(len(reply) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _compared(before: Sitting, after: Sitting, start: Drift, end: Drift, seed: int) -> dict[str, Any]:
    """Held-out numbers before and after, and paired differences."""
    metrics: dict[str, Any] = {}
    if before.scored.totals:
        rewards = before.scored.totals, after.scored.totals
        metrics |= as_metrics({"reward": mean(rewards[0], seed=seed)}, "before.")
        metrics |= as_metrics({"reward": mean(rewards[1], seed=seed)}, "after.")
        metrics |= as_metrics({"reward": paired_difference(*rewards, seed=seed)}, "change.")
    for name in before.watched.parts:
        parts = before.watched.parts[name], after.watched.parts[name]
        metrics |= as_metrics({f"watch.{name}": mean(parts[0], seed=seed)}, "before.")
        metrics |= as_metrics({f"watch.{name}": mean(parts[1], seed=seed)}, "after.")
        metrics |= as_metrics({f"watch.{name}": paired_difference(*parts, seed=seed)}, "change.")
    return {
        **metrics,
        **judged(before.answers, after.answers),
        **as_metrics({k: v for k, v in start.numbers.items() if k not in ("kl", "kl_sequence")}, "before."),
        **as_metrics(end.numbers, "after."),
    }


def _told(objective: PpoLoss) -> dict[str, Any]:
    """What the run says of itself besides its numbers."""
    journal = objective.journal
    told: dict[str, Any] = {
        "proof": objective.proof.as_rows(), "guards": objective.guards.as_rows(), "rounds": journal.rounds,
        "estimator": objective.settings.estimator.kind,
    }  # fmt: skip
    return told | ({"stopped_by": journal.stopped_by} if journal.stopped_by else {})
