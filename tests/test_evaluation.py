"""Numbers equal those worked by hand or by a slow loop, and depend on the rows alone, not on their batches."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.chat.encoded import Encoded, EncodedPair
from align.errors import StageFailed
from align.evaluation.numbers import (
    as_metrics,
    calibration,
    expected_calibration_error,
    judge_changes,
    judge_numbers,
    kl_numbers,
    length_buckets,
    likelihood_change,
    likelihood_numbers,
    policy_numbers,
    preference_numbers,
    ranking_numbers,
    reward_numbers,
    win_rate,
)
from align.judge import Verdict
from align.preference_losses import Pair
from align.rollout import scoring
from align.rollout.generation import Sampling, generate
from align.rollout.scoring import AnswerLogps, answer_logps, pair_logps, pair_rewards, reply_row, rewards


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def policy(request):
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def reward(tiny_llama):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)


@pytest.fixture(scope="module")
def rows():
    """Rows of 5 to 40 tokens; the first third of each is not trained."""
    random = np.random.default_rng(0)
    lengths = [5, 40, 12, 7, 23, 31]
    return [Encoded(random.integers(3, 300, size=n).tolist(), [i >= n // 3 for i in range(n)]) for n in lengths]


@pytest.fixture(scope="module")
def pairs(rows):
    longer = [Encoded([*row.ids, 9, 2], [*row.trained, True, True]) for row in rows]
    return [EncodedPair(row, other, len(row.ids) // 3, None, None) for row, other in zip(rows, longer, strict=True)]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Policies ------------------------------------------------------------------------------------------------------------


def slow_logps(model, row):
    with torch.no_grad():
        logps = model.eval()(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return [float(logps[i - 1, row.ids[i]]) for i in range(1, len(row.ids)) if row.trained[i]]


def test_policy_numbers_equal_a_slow_loop(policy, rows):
    logps = [logp for row in rows for logp in slow_logps(policy, row)]
    numbers = policy_numbers(policy, rows)
    loss = -sum(logps) / len(logps)
    assert numbers["loss"].value == pytest.approx(loss, abs=1e-5)
    assert numbers["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    assert numbers["tokens"].value * len(rows) == pytest.approx(len(logps))
    assert numbers["loss"].low < loss < numbers["loss"].high
    assert numbers["loss"].n == len(rows)


def test_log_probabilities_do_not_depend_on_the_batch_or_its_order(policy, rows, monkeypatch):
    whole = answer_logps(policy, rows)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 1)
    alone = answer_logps(policy, rows[::-1])
    assert torch.allclose(whole.sums, alone.sums.flip(0), atol=1e-4)
    assert whole.tokens.tolist() == alone.tokens.flip(0).tolist()


def test_evaluation_is_without_dropout_twice_equal_and_leaves_the_mode(policy, rows):
    policy.train()
    first, second = answer_logps(policy, rows), answer_logps(policy, rows)
    assert first.sums.equal(second.sums)
    assert policy.training
    assert all(module.training for module in policy.modules())
    assert torch.is_grad_enabled()


def test_nothing_trained_gives_no_number_instead_of_a_perfect_loss(policy):
    masked = [Encoded([5, 6, 7], [False] * 3)]
    assert policy_numbers(policy, masked) == {}
    assert policy_numbers(policy, []) == {}


def test_a_large_vocabulary_goes_through_in_small_batches(policy, rows, monkeypatch):
    sizes = []
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 300 * 45)
    monkeypatch.setattr(scoring, "is_lean", lambda _: False)
    whole = scoring.trained_logps
    monkeypatch.setattr(scoring, "trained_logps", lambda model, some: sizes.append(len(some)) or whole(model, some))
    answer_logps(policy, rows)
    assert sizes[0] == 1
    assert sum(sizes) == len(rows)


def test_the_change_of_loss_is_paired():
    before = AnswerLogps(tensor(-10.0, -40.0, -2.0), tensor(5.0, 10.0, 2.0))
    after = AnswerLogps(tensor(-9.5, -39.0, -1.8), tensor(5.0, 10.0, 2.0))
    change = likelihood_change(before, after)["loss"]
    assert change.value == pytest.approx(-1.7 / 17)
    assert change.high < 0, "every row improved, whatever their spread"
    assert likelihood_numbers(before)["loss"].value == pytest.approx(52 / 17)


def test_preference_numbers_equal_the_worked_example():
    policy = Pair(tensor(-1.0, -5.0, -3.0, -2.0), tensor(-2.0, -4.0, -3.0, -9.0))
    numbers = preference_numbers(policy)
    assert numbers["likelihood_accuracy"].value == 2.5 / 4
    assert set(numbers) == {"likelihood_accuracy"}
    reference = Pair(tensor(-1.0, -6.0, -4.0, -2.0), tensor(-2.0, -4.0, -3.0, -8.0))
    numbers = preference_numbers(policy, reference, beta=0.5)
    assert numbers["accuracy"].value == 3.5 / 4  # log-ratio margins 0, 1, 1, 1
    assert numbers["margin"].value == pytest.approx(0.5 * 3 / 4)
    assert numbers["reward_chosen"].value == pytest.approx(0.5 * 2 / 4)


def test_policy_equal_to_its_reference_has_accuracy_one_half_in_spite_of_rounding(policy, pairs, monkeypatch):
    logps = pair_logps(policy, pairs).logps
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 60)
    numbers = preference_numbers(logps, pair_logps(policy, pairs).logps)
    assert numbers["accuracy"].value == 0.5
    assert numbers["margin"].value == pytest.approx(0, abs=1e-4)
    assert preference_numbers(Pair(tensor(), tensor())) == {}


def test_kl_is_zero_against_itself_and_positive_against_another(tiny_gpt2):
    policy, other = (AutoModelForCausalLM.from_pretrained(tiny_gpt2) for _ in range(2))
    with torch.no_grad():
        other.transformer.wte.weight.add_(0.05 * torch.randn(other.transformer.wte.weight.shape))
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    prompts = [[1, 40 + i] for i in range(64)]
    replies = generate(policy, tokenizer, prompts, Sampling(12, temperature=1.0), stop_ids=[2])
    rows = [reply_row(prompt, reply.ids) for prompt, reply in zip(prompts, replies, strict=True)]
    logps = answer_logps(policy, rows)
    assert logps.sums.tolist() == pytest.approx([sum(reply.logps) for reply in replies], abs=1e-3)
    assert kl_numbers(logps, logps)["kl"].value == 0
    moved = kl_numbers(logps, answer_logps(other, rows))
    assert moved["kl"].low > 0
    assert moved["kl_sequence"].value == pytest.approx(moved["kl"].value * float(logps.tokens.mean()))
    back = kl_numbers(answer_logps(other, rows), logps)
    assert back["kl"].value == pytest.approx(-moved["kl"].value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_of_a_model_that_gives_none_are_refused_in_words_and_without_a_warning(
    value, policy, reward, rows, pairs
):
    """The fault lies in the row of one token, so that some texts have a number and others have none."""
    for model, what, numbers in (
        (policy, "log-probabilities", lambda model: policy_numbers(model, rows)),
        (reward, "rewards", lambda model: reward_numbers(model, pairs)),
    ):
        broken = copy.deepcopy(model)
        token = next(token for token in rows[1].ids if token not in rows[0].ids)
        broken.get_input_embeddings().weight.data[token] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(StageFailed, match=rf"{what} that are not finite to \d+ of \d+ rows \(row \d+: nan\)"):
                numbers(broken)


# Reward models -------------------------------------------------------------------------------------------------------


def test_rewards_do_not_depend_on_the_batch_or_its_order(reward, rows, monkeypatch):
    whole = rewards(reward, rows)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 1)
    assert torch.allclose(whole, rewards(reward, rows[::-1]).flip(0), atol=1e-5)


def test_reward_numbers_of_a_model_agree_with_its_rewards(reward, pairs):
    numbers = reward_numbers(reward, pairs)
    chosen, rejected = pair_rewards(reward, pairs)
    assert numbers["accuracy"].value == float((chosen > rejected).double().mean())
    assert numbers["margin"].value == pytest.approx(float((chosen - rejected).mean()))
    assert {"loss", "length_correlation", "ece", "length_buckets", "calibration"} <= set(numbers)
    assert sum(row["n"] for row in numbers["length_buckets"]) == len(pairs)
    assert reward_numbers(reward, []) == {}


def test_ranking_numbers_equal_the_worked_example():
    scores = Pair(tensor(2.0, 0.0, 1.0), tensor(1.0, 1.0, 1.0))
    numbers = ranking_numbers(scores, np.array([[20.0, 10.0], [5.0, 10.0], [10.0, 10.0]]))
    assert numbers["accuracy"].value == pytest.approx(1.5 / 3)
    assert numbers["margin"].value == pytest.approx(0)
    assert numbers["loss"].value == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.e) + math.log(2)) / 3)
    assert numbers["length_correlation"].value == pytest.approx(
        np.corrcoef([2, 0, 1, 1, 1, 1], [20, 5, 10, 10, 10, 10])[0, 1]
    )


def test_a_model_that_only_counts_words_is_seen_through():
    lengths = np.array([[30.0, 10.0]] * 6 + [[10.0, 30.0]] * 4 + [[20.0, 21.0]] * 2)
    scores = Pair(torch.from_numpy(lengths[:, 0]), torch.from_numpy(lengths[:, 1]))
    numbers = ranking_numbers(scores, lengths)
    assert numbers["length_correlation"].value == pytest.approx(1)
    buckets = {row["bucket"]: row for row in length_buckets((scores.chosen - scores.rejected).tolist(), lengths)}
    assert (buckets["longer"]["value"], buckets["longer"]["n"]) == (1, 6)
    assert (buckets["shorter"]["value"], buckets["shorter"]["n"]) == (0, 4)
    assert buckets["like length"]["n"] == 2


def test_calibration_equals_the_worked_example():
    sure, unsure = math.log(0.95 / 0.05), math.log(0.55 / 0.45)
    margins = [sure] * 8 + [-sure] * 2 + [unsure] * 6 + [-unsure] * 4
    low, high = calibration(margins)
    assert (low["confidence"], low["accuracy"], low["n"]) == (pytest.approx(0.55), 0.6, 10)
    assert (high["confidence"], high["accuracy"], high["n"]) == (pytest.approx(0.95), 0.8, 10)
    assert expected_calibration_error(margins).value == pytest.approx((0.05 + 0.15) / 2)


def test_each_tenth_of_confidence_is_a_bin_of_its_own():
    margins = [math.log(share / (1 - share)) for share in (0.55, 0.65, 0.75, 0.85, 0.95)]
    assert [row["n"] for row in calibration(margins)] == [1] * 5


@pytest.mark.parametrize("margins", [[0.0], [1e4, -1e4], [0.0, 0.0, 3.0]])
def test_extreme_margins_fall_into_a_bin(margins):
    assert sum(row["n"] for row in calibration(margins)) == len(margins)
    assert 0 <= expected_calibration_error(margins).value <= 1


def test_win_rate_counts_ties_half():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).value == 2.5 / 4


# Judged answers ------------------------------------------------------------------------------------------------------

GOOD, WRONG = Verdict(True, False, (), 1.0), Verdict(False, False, ("kind",), 0.0)
REFUSED, OPEN = Verdict(None, True, (), 0.5), Verdict(None, False, ("kind", "brief"), 0.2)


def test_judge_numbers_equal_the_worked_example():
    expected = [{"answer": "a"}, {"answer": "b"}, {"refuse": True}, None]
    numbers = judge_numbers([GOOD, WRONG, REFUSED, OPEN], expected)
    assert (numbers["correct"].value, numbers["correct"].n) == (0.5, 2)
    assert numbers["score"].value == pytest.approx(1.7 / 4)
    assert numbers["violations"].value == 3 / 4
    assert numbers["violation_rate"].value == 0.5
    assert numbers["violation.kind"].value == 0.5
    assert numbers["violation.brief"].value == 0.25
    assert (numbers["refused_rightly"].value, numbers["refused_rightly"].n) == (1, 1)
    assert (numbers["refused_wrongly"].value, numbers["refused_wrongly"].n) == (0, 2)


def test_what_no_row_tells_is_left_out():
    assert judge_numbers([]) == {}
    assert not {"correct", "refused_rightly", "refused_wrongly"} & set(judge_numbers([OPEN, REFUSED]))


def test_judge_changes_compare_the_same_prompts():
    changes = judge_changes([WRONG, WRONG, OPEN], [GOOD, WRONG, OPEN])
    assert changes["score"].value == pytest.approx(1 / 3)
    assert (changes["correct"].value, changes["correct"].n) == (0.5, 2)
    assert changes["violations"].value == pytest.approx(-1 / 3)
    with pytest.raises(ValueError):
        judge_changes([GOOD], [GOOD, GOOD])


def test_metrics_are_plain_json():
    metrics = as_metrics({"win_rate": win_rate([1.0], [0.0]), "calibration": [{"n": 1}]}, "after.")
    assert metrics["after.win_rate"]["value"] == 1
    assert set(metrics["after.win_rate"]) == {"value", "low", "high", "n"}
    assert metrics["after.calibration"] == [{"n": 1}]
