"""The ppo stage on a tiny model: proved at step 0, cut up as one likes, resumed to the bit, and it learns what is rewarded."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.chat.encoder import Encoder
from align.data.examples import Message, Prompt
from align.errors import AlignError, Interrupted, StageFailed
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.ppo.collection import Collector
from align.ppo.objective import PpoLoss
from align.ppo.round import Round
from align.rollout.engine import LocalEngine
from align.stages import ppo
from align.state import complete_states
from align.stopping import signals_handled
from tests.ppo_kit import Listener, adapter_of, chat_base, inputs, prompts, reward_of, settings, weights_of

LORA = {"rank": 4}


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tiny_llama, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def stopping(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a head that is inclined to the stop token after some tokens: responses end at different lengths."""
    tokenizer = load_tokenizer(source_of(base))
    model: Any = load_policy(source_of(base), precision="float32")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 40
    folder = tmp_path_factory.mktemp("stopping")
    save_checkpoint(model, tokenizer, folder)
    return folder


ANSWERED = [  # prompts that hold the stop token, at the end of the turn before
    Prompt((Message("user", "heron"), Message("assistant", "pier " * n), *one.messages), one.expected)
    for n, one in enumerate(prompts())
]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """The rounds that are collected from here on."""
    collect, found = Collector.collect, []

    def kept(self: Collector, roles: Any, number: int) -> Any:
        collected = collect(self, roles, number)
        found.append(collected.round)
        return collected

    monkeypatch.setattr(Collector, "collect", kept)
    return found


def run(base: Path, work: Path, rewards: Any = None, heard: Listener | None = None, **changes: Any) -> Any:
    """One run; what came out, and what was heard, under `outcome.heard`."""
    heard = heard or Listener()
    given = changes.pop("given", {})
    outcome = ppo.run(settings(**changes), inputs(base, work, rewards, **given), work / "out", heard)
    outcome.heard = heard
    return outcome


def trained(work: Path) -> torch.Tensor:
    return weights_of(source_of(work / "out"))


# Step 0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["full", "adapter", "nf4", "on an adapter", "trunk", "value model", "rloo"])
def test_the_five_checks_hold_and_are_recorded(way: str, base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "full": {}, "adapter": {"adapter": LORA}, "nf4": {"adapter": LORA, "quantize": "nf4"}, "on an adapter": {},
        "trunk": {"adapter": LORA, "value": "trunk"}, "value model": {"adapter": LORA, "value": "model"},
        "rloo": {"estimator": "rloo"},
    }[way]  # fmt: skip
    parent = adapter_of(base, tmp_path / "parent") if way == "on an adapter" else base
    rewards = {"judge": reward_of(base, tmp_path / "reward", adapter=way == "adapter")}
    outcome = run(parent, tmp_path, rewards, reward="judge", rounds=1, **changes)
    proof = outcome.metrics["proof"]
    assert [row["holds"] for row in proof] == [True] * 5
    assert {row["check"].split(" (")[0] for row in proof} == {
        "KL to the reference is 0", "the ratio is 1 in the first minibatch", "no reward sits on a pad token",
        "the reward inside is that of `align score`", "the value model predicts finite values",
    }  # fmt: skip
    assert outcome.heard.series("round.kl")[0] == 0
    assert outcome.heard.series("train.clip_fraction")[0] == 0


@pytest.mark.parametrize("value", ["model", "trunk"])
def test_after_a_value_warm_up_the_ratio_is_proved_too(value: str, base: Path, tmp_path: Path) -> None:
    outcome = run(base, tmp_path, value={"kind": value, "warmup_rounds": 1})
    assert [row["holds"] for row in outcome.metrics["proof"]] == [True] * 5


@pytest.mark.parametrize("way", ["dora", "pissa", "nf4"])
def test_the_checks_hold_in_bfloat16(way: str, base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "dora": {"adapter": {**LORA, "dora": True}}, "pissa": {"adapter": {**LORA, "init": "pissa"}},
        "nf4": {"adapter": LORA, "quantize": "nf4"},
    }[way]  # fmt: skip
    outcome = run(base, tmp_path, rounds=1, precision="bfloat16", **changes)
    assert [row["holds"] for row in outcome.metrics["proof"]] == [True] * 5


def test_a_generator_that_is_not_the_policy_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LocalEngine.generate

    def off(self: LocalEngine, *rest: Any, **named: Any) -> Any:
        return [replace(reply, logps=[logp - 0.1 for logp in reply.logps]) for reply in generate(self, *rest, **named)]

    monkeypatch.setattr(LocalEngine, "generate", off)
    with pytest.raises(StageFailed, match=r"generated with other probabilities than the policy's \(off by 0.1 nats"):
        run(base, tmp_path)


def test_a_reference_that_is_not_the_parent_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = adapter_of(base, tmp_path / "other")
    monkeypatch.setattr(
        "align.models.roles.RoleOpener._reference",
        lambda _self, _policy: load_policy(source_of(other), precision="float32"),
    )
    with pytest.raises(StageFailed, match="step 0 of ppo: it does not hold that KL to the reference is 0"):
        run(base, tmp_path)
    assert not complete_states(tmp_path / "state")


def test_old_log_probabilities_that_are_not_the_policys_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Collector.collect

    def shifted(self: Collector, roles: Any, number: int) -> Any:
        found = collect(self, roles, number)
        found.round.old_logps.mul_(1.05)
        return found

    monkeypatch.setattr(Collector, "collect", shifted)
    monkeypatch.setattr("align.ppo.proof.KL_LIMIT", 1e9)
    with pytest.raises(StageFailed, match="the ratio is 1 in the first minibatch"):
        run(base, tmp_path)


def test_rewards_that_differ_from_align_score_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = {"judge": reward_of(base, tmp_path / "reward", adapter=True)}
    put = ppo.put_reward_adapter
    monkeypatch.setattr(ppo, "put_reward_adapter", lambda *rest, **named: put(*rest, **named) * 2)
    with pytest.raises(StageFailed, match="the reward inside is that of `align score`"):
        run(base, tmp_path, rewards, reward="judge", adapter=LORA)


# The loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["tokens", "rows", "constant"])
def test_a_step_cut_into_micro_batches_gives_the_same_policy(
    average: str, stopping: Path, tmp_path: Path, rounds: list[Round]
) -> None:
    """A mean of the means of micro-batches would be another one: responses have different lengths."""
    for name, budget in (("whole", 8192), ("cut", 1)):
        run(stopping, tmp_path / name, average=average, batch_tokens=budget, rounds=1, given={"rows": ANSWERED})
    assert rounds[0].responses == rounds[1].responses
    assert len(set(map(len, rounds[0].responses))) > 2
    start = weights_of(source_of(stopping))
    whole, cut = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert (whole - start).norm() > 0.1
    assert (whole - cut).norm() / (whole - start).norm() < 2e-3


def test_padded_rows_give_the_same_policy_as_packed_ones(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(base, tmp_path / "packed", rounds=1)
    monkeypatch.setattr("align.models.trunk.attends_by_document", lambda _model: False)
    run(base, tmp_path / "padded", rounds=1)
    start = weights_of(source_of(base))
    packed, padded = trained(tmp_path / "packed"), trained(tmp_path / "padded")
    assert (packed - padded).norm() / (packed - start).norm() < 2e-3


def test_pad_that_is_the_stop_token_changes_nothing(stopping: Path, tmp_path: Path, rounds: list[Round]) -> None:
    """Masks come from lengths: a stop token in a prompt, or at the end of a response, is a token."""
    folder = Path(shutil.copytree(stopping, tmp_path / "pad-is-eos"))
    tokenizer = load_tokenizer(source_of(folder))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    stop, given = tokenizer.eos_token_id, {"rows": ANSWERED}
    heard = [run(one, tmp_path / one.name, rounds=1, given=given).heard for one in (stopping, folder)]
    assert torch.equal(*(trained(tmp_path / one.name) for one in (stopping, folder)))
    for name in ("round.reward", "round.kl", "round.entropy", "round.length", "train.policy_loss", "train.value_loss"):
        assert heard[0].series(name) == heard[1].series(name)
    one, other = rounds
    assert all(stop in prompt for prompt in one.prompts)
    ended = [response for response in one.responses if response[-1] == stop]
    assert len(set(map(len, ended))) > 1
    assert len(ended) < len(one.responses)
    assert (one.prompts, one.responses) == (other.prompts, other.responses)
    for table in (one.old_logps, one.reference_logps, one.advantages):
        assert [int(row.count_nonzero()) for row in table] == list(map(len, one.responses))
        assert all(row[: len(response)].all() for row, response in zip(table, one.responses, strict=True))
    real = sum(map(len, one.responses)) - len(ended)  # a length does not count the stop token
    assert heard[0].series("round.length") == [real / len(one.responses)]


class StopsAfter(Listener):
    """Sends a signal to this process after a step of training."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @contextmanager
    def bar(self, title: str, total: float):
        progress, done = self, 0

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                nonlocal done
                done += amount
                if title == "training" and amount and done == progress.step:
                    signal.raise_signal(signal.SIGTERM)

        yield Bar()


HARD = {  # all that goes on from round to round: adaptive KL, running moments, the end of a round by KL
    "rounds": 3, "kl_target": 0.5, "kl_horizon": 100, "normalize_reward": True, "adapter": LORA, "measure_rounds": 1,
    "round_kl_limit": 0.05, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_resumed_equals_uninterrupted_to_the_bit(step: int, base: Path, tmp_path: Path) -> None:
    """Within a round, at its end, and at the first step of the next."""
    never = run(base, tmp_path / "never", **HARD)
    with signals_handled(), pytest.raises(Interrupted) as stop:
        run(base, tmp_path / "stopped", heard=StopsAfter(step), **HARD)
    assert stop.value.exit_code == 143
    heard = Listener()
    with signals_handled():
        again = run(base, tmp_path / "stopped", heard=heard, **HARD)
    assert torch.equal(trained(tmp_path / "never"), trained(tmp_path / "stopped"))
    assert again.metrics == never.metrics
    assert [row["over_time"] for row in again.samples] == [row["over_time"] for row in never.samples]
    tail = len(heard.series("train.policy_loss"))
    assert heard.series("train.policy_loss") == never.heard.series("train.policy_loss")[-tail:]


def test_the_same_seed_gives_the_same_policy_and_another_seed_another(base: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(base, tmp_path / name, rounds=1, given={"seed": seed})
    assert torch.equal(trained(tmp_path / "a"), trained(tmp_path / "b"))
    assert not torch.equal(trained(tmp_path / "a"), trained(tmp_path / "c"))


def test_a_value_warm_up_leaves_the_policy_alone(base: Path, tmp_path: Path) -> None:
    for value in ("model", "trunk"):
        work = tmp_path / value
        outcome = run(base, work, rounds=1, round_epochs=10, value={"kind": value, "warmup_rounds": 1})
        assert torch.equal(trained(work), weights_of(source_of(base)))
        losses = outcome.heard.series("train.value_loss")
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_round_ends_when_the_policy_has_gone_too_far(base: Path, tmp_path: Path) -> None:
    far = run(base, tmp_path / "far", rounds=1, round_epochs=8, learning_rate=1e-2)
    near = run(base, tmp_path / "near", rounds=1, round_epochs=8, learning_rate=1e-2, round_kl_limit=1e-4)
    assert len([kl for kl in near.heard.series("train.round_kl") if kl]) < len(far.heard.series("train.round_kl"))
    assert near.metrics["after.kl"]["value"] < far.metrics["after.kl"]["value"]


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": {"kind": "rloo", "samples": 4}},
        {"estimator": {"kind": "grpo", "samples": 4}, "kl_in": "loss", "kl_estimator": "k3"},
        {"estimator": {"kind": "grpo", "samples": 4, "divide_by_std": False}, "average": "constant"},
        {"estimator": "reinforce++", "kl_estimator": "k2"},
        {"value": "trunk"},
        {"entropy_coefficient": 0.01, "clip_high": 0.3, "top_k": 50, "top_p": 0.9, "temperature": 0.8},
    ],
    ids=["rloo", "grpo", "dr-grpo", "reinforce++", "trunk", "bonus"],
)
def test_what_is_rewarded_is_learnt(changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """The letter e in six tokens, by every estimator."""
    outcome = run(
        base, tmp_path, rounds=10, rollouts=32, batch_size=16, learning_rate=5e-3, kl_coefficient=0.001, **changes
    )
    rewards = outcome.heard.series("round.reward")
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.3


# Guards --------------------------------------------------------------------------------------------------------------


def test_a_guard_warns_and_stops_where_the_recipe_says_so(base: Path, tmp_path: Path) -> None:
    wild = {"rounds": 6, "learning_rate": 3e-2, "kl_coefficient": 0.0, "guards": {"kl_limit": 0.5}}
    warned = run(base, tmp_path / "warned", **wild)
    assert warned.metrics["rounds"] == 6
    assert warned.metrics["guards"][0]["guard"] == "kl"
    assert any("above the limit of 0.5" in note for note in warned.heard.notes)
    wild["guards"] = {"kl_limit": 0.5, "stop_on": ["kl"]}
    stopped = run(base, tmp_path / "stopped", **wild)
    assert stopped.metrics["stopped_by"] == "kl"
    assert stopped.metrics["rounds"] < 6
    assert (tmp_path / "stopped" / "out" / "model.safetensors").is_file()


def test_what_a_guard_stopped_stays_stopped_when_it_is_run_again(base: Path, tmp_path: Path) -> None:
    """A state may be saved at the very step that the guard ended, and a killed process goes on from there."""
    wild = {
        "rounds": 6, "round_epochs": 1, "batch_size": 8, "save_steps": 1, "learning_rate": 3e-2, "kl_coefficient": 0.0,
        "guards": {"kl_limit": 0.5, "stop_on": ["kl"]},
    }  # fmt: skip
    first = run(base, tmp_path, **wild)
    assert first.metrics["rounds"] < 6
    assert run(base, tmp_path, **wild).metrics == first.metrics


# Numbers -------------------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_that_is_told_is_the_one_that_is_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, used = PpoLoss._policy_part, {}

    def spied(self: PpoLoss, *rest: Any) -> Any:
        used[self._now.number] = self.collector.controls.kl.value
        return part(self, *rest)

    monkeypatch.setattr(PpoLoss, "_policy_part", spied)
    steered = {"kl_in": "loss", "kl_estimator": "k2", "kl_target": 0.5, "kl_horizon": 10, "learning_rate": 1e-2}
    outcome = run(base, tmp_path, rounds=3, **steered)
    assert outcome.heard.series("round.kl_coefficient") == [used[number] for number in range(3)]
    assert len(set(used.values())) == 3


def test_a_run_that_max_steps_cuts_is_measured_as_often_as_another(base: Path, tmp_path: Path) -> None:
    outcome = run(base, tmp_path, rounds=None, epochs=100.0, max_steps=20)
    assert outcome.metrics["rounds"] == 5
    assert len(outcome.heard.series("eval.reward")) == 5


def test_a_watched_reward_is_logged_whatever_its_name(base: Path, tmp_path: Path) -> None:
    reward = reward_of(base, tmp_path / "reward")
    outcome = run(base, tmp_path, {"my_std": reward}, rounds=1, watch="my_std")
    assert len(outcome.heard.series("eval.watch.my_std")) == 1


def test_nothing_held_out_leaves_out_what_would_be_measured(base: Path, tmp_path: Path) -> None:
    outcome = run(base, tmp_path, rounds=1, watch={"kind": "length", "target_tokens": 3}, given={"questions": []})
    assert outcome.samples == []
    assert not {"before.reward", "after.reward", "after.kl"} & set(outcome.metrics)
    assert outcome.heard.series("eval.reward") == []


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("[float('nan')] * len(responses)", "returned nan for response 1"),
        ("[1.0]", "returned 1 values for 8 responses"),
    ],
)
def test_a_reward_that_gives_no_numbers_stops_at_the_first_round(
    result: str, words: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange_reward.py").write_text(f"def f(prompts, responses, expected):\n    return {result}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "strange_reward", raising=False)
    with pytest.raises(AlignError, match=words if "nan" in words else "returned 1 values for"):
        run(base, tmp_path, reward={"kind": "function", "name": "strange_reward:f"}, allow_code=True)
    assert not (tmp_path / "out").exists()


def test_prompts_that_leave_no_room_are_dropped_cut_or_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source_of(base))
    lengths = sorted(len(Encoder(tokenizer, max_length=256).prompt(prompt.messages)) for prompt in prompts(8))
    longest = lengths[3] + 6  # room for the shorter half, with a response of six tokens
    longer = sum(length > lengths[3] for length in lengths)
    dropped = run(base, tmp_path / "a", rounds=1, max_length=longest)
    assert 0 < dropped.lengths["dropped"] == longer
    cut = run(base, tmp_path / "b", rounds=1, max_length=longest, cut_prompt=True)
    assert (cut.lengths["cut_prompts"], cut.lengths["dropped"], cut.lengths["longest"]) == (longer, 0, lengths[3])
    with pytest.raises(AlignError, match=r"prompt \d has \d+ tokens; with max_new_tokens: 6"):
        run(base, tmp_path / "c", rounds=1, max_length=longest, too_long="error")
    with pytest.raises(AlignError, match="none of the 8 prompts leaves room"):
        run(base, tmp_path / "d", rounds=1, max_length=8)


def test_prompts_that_leave_a_reward_model_no_room_are_refused_before_training(base: Path, tmp_path: Path) -> None:
    """Prompt and response fill the context, and the stop token that a cut-off response lacks comes on top."""
    encoder, prompt = Encoder(load_tokenizer(source_of(base)), max_length=256), (Message("user", "7"),)
    while len(encoder.prompt(prompt)) < 250:  # a token at a time
        prompt = (Message("user", prompt[0].content + "7"),)
    rewards = {"judge": reward_of(base, tmp_path / "reward")}
    alone = {"rows": [Prompt(prompt)], "questions": []}
    with pytest.raises(AlignError, match="a reply of 6 tokens to prompt 1 has 257 tokens with its prompt"):
        run(base, tmp_path, rewards, reward="judge", rounds=1, given=alone)
    assert not complete_states(tmp_path / "state")


def test_a_long_prompt_leaves_room_for_the_probe_of_a_reward_model(base: Path, tmp_path: Path) -> None:
    text = "heron figs pier " * 12  # twice that is beyond the context
    rewards = {"judge": reward_of(base, tmp_path / "reward")}
    given = {"rows": [Prompt((Message("user", text),))], "questions": []}
    assert run(base, tmp_path, rewards, reward="judge", rounds=1, given=given).metrics["rounds"] == 1


def test_a_state_holds_no_frozen_weight(base: Path, tmp_path: Path) -> None:
    """What is saved while a run goes on is what it trains: two adapters, not four roles."""
    with signals_handled(), pytest.raises(Interrupted):
        run(base, tmp_path, heard=StopsAfter(2), adapter=LORA)
    (state,) = complete_states(tmp_path / "state")
    from safetensors.torch import load_file

    names = set(load_file(state / "trained.safetensors"))
    assert names
    assert all(".lora_" in name or name.startswith("value_head") for name in names)
    assert json.loads((state / "ppo.json").read_text())["journal"]["rounds"] == 1
