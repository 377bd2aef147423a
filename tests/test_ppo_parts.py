"""The small parts of ppo: which prompts and responses a step gets, the micro-batches, the numbers, the guards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.ppo import prompts as prompts_module
from align.ppo.guards import Guards
from align.ppo.prompts import RoundStream, prompts_of_round, rounds_of
from align.ppo.round import Round, Tokens
from align.ppo.statistics import repetition, round_numbers
from align.recipe.ppo_settings import GuardSettings
from align.rollout.generation import Reply
from tests.ppo_kit import settings

CPU = torch.device("cpu")


def test_every_prompt_is_answered_once_before_any_is_again() -> None:
    made = settings(rollouts=8)
    asked = [place for number in range(5) for place in prompts_of_round(number, 10, made, seed=1)]
    assert [sorted(asked[start : start + 10]) for start in range(0, 40, 10)] == [list(range(10))] * 4
    assert asked[:10] != asked[10:20]
    assert asked != [place for number in range(5) for place in prompts_of_round(number, 10, made, seed=2)]


def test_many_prompts_are_shuffled_once_for_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = []
    order = prompts_module.epoch_order
    monkeypatch.setattr(prompts_module, "epoch_order", lambda *about: shuffled.append(about) or order(*about))
    prompts_of_round(3, 1000, settings(rollouts=64), seed=0)
    assert shuffled == [(1000, 0, 0)]


def test_samples_of_a_prompt_stand_side_by_side() -> None:
    made = settings(rollouts=8, estimator={"kind": "rloo", "samples": 4})
    places = prompts_of_round(0, 10, made, seed=0)
    assert places[:4] == [places[0]] * 4
    assert places[4:] == [places[4]] * 4
    assert places[0] != places[4]


def test_rounds_follow_from_epochs_unless_they_are_given() -> None:
    assert rounds_of(100, settings(rollouts=8, rounds=None, epochs=1.0)) == 13
    assert rounds_of(100, settings(rollouts=8, rounds=None, epochs=0.5)) == 7
    assert rounds_of(100, settings(rollouts=8, rounds=None, estimator={"kind": "grpo", "samples": 4})) == 50
    assert rounds_of(100, settings(rollouts=8, rounds=3, epochs=9.0)) == 3


def test_each_epoch_of_a_round_has_every_response_once() -> None:
    made = settings(rollouts=10, batch_size=4, round_epochs=2)
    stream = RoundStream(3, made, seed=0)
    steps = list(stream)
    assert len(steps) == len(stream) == 3 * 2 * 3
    flat = [[ticket for step in steps[start : start + 3] for ticket in step] for start in range(0, 18, 3)]
    assert [sorted(epoch) for epoch in flat] == [list(range(10 * (n // 2), 10 * (n // 2) + 10)) for n in range(6)]
    assert flat[0] != flat[1]
    assert len(RoundStream(3, settings(rollouts=10, batch_size=4, round_epochs=2, max_steps=5), seed=0)) == 5


def test_the_token_before_predicts_and_masks_come_from_lengths() -> None:
    tokens = Tokens.of([[1, 7], [1, 8, 9]], [[5, 2], [6]], CPU)
    assert tokens.rows == [[1, 7, 5, 2], [1, 8, 9, 6]]
    assert tokens.places.tolist() == [1, 2, 6]
    assert tokens.targets.tolist() == [5, 2, 6]
    assert tokens.mask.tolist() == [[True, True], [True, False]]
    assert tokens.table(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2], [3, 0]]


def test_a_round_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    tables = [torch.randn(2, 3) for _ in range(6)]
    found = Round(7, [[1, 2], [3]], [[4, 5, 6], [7]], *tables)
    found.save(tmp_path)
    again = Round.load(tmp_path)
    assert (again.number, again.prompts, again.responses) == (7, found.prompts, found.responses)
    assert torch.equal(again.old_logps, tables[0])
    assert torch.equal(again.weights, tables[5])
    mask = again.tokens([1], CPU).mask
    assert again.columns([1], mask)["values"].shape == (1, 1)


def test_a_length_does_not_count_the_stop_token() -> None:
    found = Round(0, [[1], [1]], [[5, 6, 2], [5, 6, 7]], *[torch.zeros(2, 3)] * 6)
    replies = [Reply([5, 6, 2], "", True, [0.0] * 3), Reply([5, 6, 7], "", False, [0.0] * 3)]
    numbers = round_numbers(found, torch.ones(2, 3).bool(), torch.zeros(2, 3), torch.zeros(2, 3), replies, [2.0, 3.0])
    assert numbers["length"] == 2.5
    assert numbers["length_correlation"] == pytest.approx(1.0)


def test_repetition_counts_runs_of_four_that_came_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


CALM = {"kl": 1.0, "entropy": 2.0, "length_correlation": 0.1, "repetition": 0.0}


@pytest.mark.parametrize(
    ("guard", "numbers"),
    [
        ("kl", {"kl": 31.0}),
        ("entropy", {"entropy": 0.19}),
        ("length", {"length_correlation": 0.9}),
        ("repetition", {"repetition": 0.6}),
    ],
)
def test_each_guard_is_raised_by_its_own_sign_and_by_no_other(guard: str, numbers: dict[str, float]) -> None:
    guards = Guards(GuardSettings(stop_on=[guard]))
    assert guards.look(0, CALM) == []
    (alarm,) = guards.look(1, CALM | numbers)
    assert (alarm.guard, alarm.round, alarm.value) == (guard, 1, next(iter(numbers.values())))
    assert guards.stops([alarm]) == alarm
    assert Guards(GuardSettings()).stops([alarm]) is None


def test_what_was_so_at_the_start_is_not_the_policys_doing() -> None:
    guards = Guards(GuardSettings())
    odd = CALM | {"length_correlation": 0.95, "repetition": 0.7}
    assert guards.look(0, odd) == []
    assert guards.look(1, odd) == []


def test_a_guard_is_told_once_and_again_when_it_had_been_quiet() -> None:
    guards = Guards(GuardSettings(kl_limit=2.0))
    wild = CALM | {"kl": 3.0}
    assert [len(guards.look(number, values)) for number, values in enumerate([CALM, wild, wild, CALM, wild])] == [
        0, 1, 0, 0, 1,
    ]  # fmt: skip
    assert [row["round"] for row in guards.as_rows()] == [1, 4]


@pytest.mark.parametrize(
    ("now", "raised"),
    [
        ({"reward": 2.0, "judge_score": 0.4}, True),
        ({"reward": 2.0, "judge_score": 0.47}, False),
        ({"reward": 0.5, "judge_score": 0.4}, False),
        ({"reward": 2.0, "judge_score": 0.6, "watch.other": -3.0, "watch_std.other": 2.0}, True),
        ({"reward": 2.0, "judge_score": 0.6, "watch.other": 0.95, "watch_std.other": 2.0}, False),
    ],
    ids=["gold falls", "a little", "reward falls too", "watched falls", "watched falls a little"],
)
def test_overoptimisation_is_a_reward_that_rises_while_gold_falls(now: dict[str, float], raised: bool) -> None:
    guards = Guards(GuardSettings())
    start = {"reward": 1.0, "judge_score": 0.5, "watch.other": 1.0, "watch_std.other": 2.0}
    assert guards.look_held_out(0, start) == []
    assert [alarm.guard for alarm in guards.look_held_out(2, now)] == (["overoptimisation"] if raised else [])


def test_guards_go_on_where_they_were() -> None:
    guards = Guards(GuardSettings(kl_limit=2.0))
    guards.look(0, CALM)
    guards.look(1, CALM | {"kl": 3.0})
    again = Guards(GuardSettings(kl_limit=2.0))
    again.restore(guards.state())
    assert again.look(2, CALM | {"kl": 3.0}) == []
    assert again.state() == guards.state()
