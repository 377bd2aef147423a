"""Who is who in policy optimisation: the reference is what the stage starts from, and gradients go where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.chat.templates import prepare_tokenizer
from align.errors import AlignError
from align.models.adapters import fits_policy, put_reward_adapter
from align.models.folders import load_tokenizer
from align.models.head import target_logps
from align.models.loading import load_policy
from align.models.merging import materialize
from align.models.roles import AdapterReward, RoleOpener, Roles
from align.models.source import source_of
from align.models.trunk import hidden_states
from align.rewards.model import RewardModel, context_encoder, said
from align.rollout import refill
from align.rollout.generation import Sampling, generate
from tests.ppo_kit import adapter_of, chat_base, prompts, reward_of, settings

ROWS = [[1, 9, 8, 7, 30, 2], [1, 40, 41, 42, 43, 44, 45, 2], [1, 5, 2]]
LORA = {"rank": 4}


def opened(parent: Path, work: Path, reward: Path | None = None, **changes: Any) -> Roles:
    source = source_of(parent)
    tokenizer = load_tokenizer(source)
    return RoleOpener(settings(**changes), source, source_of(reward) if reward else None, tokenizer, 0, work).open()


def logps(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([token for row in ROWS for token in row])
    return target_logps(model, hidden_states(model, ROWS), ids)[0]


def parents(tiny_llama: Path, tmp_path: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every way in which a stage can start, by name."""
    adapter = adapter_of(tiny_llama, tmp_path / "adapter")
    return {
        "full model, all weights": (tiny_llama, {}),
        "full model, new adapter": (tiny_llama, {"adapter": LORA}),
        "full model, new adapter on nf4": (tiny_llama, {"adapter": LORA, "quantize": "nf4"}),
        "full model, new DoRA": (tiny_llama, {"adapter": {**LORA, "dora": True}}),
        "full model, new PiSSA": (tiny_llama, {"adapter": {**LORA, "init": "pissa"}}),
        "adapter": (adapter, {}),
        "adapter on nf4": (adapter_of(tiny_llama, tmp_path / "nf4", quantize="nf4"), {}),
        "merged adapter": (Path(materialize(source_of(adapter), tmp_path / "merged").path), {}),
    }


WAYS = [
    "full model, all weights", "full model, new adapter", "full model, new adapter on nf4", "full model, new DoRA",
    "full model, new PiSSA", "adapter", "adapter on nf4", "merged adapter",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_reference_is_the_parent_whatever_it_was(way: str, tiny_llama: Path, tmp_path: Path) -> None:
    parent, changes = parents(tiny_llama, tmp_path)[way]
    roles = opened(parent, tmp_path, **changes)
    with torch.no_grad():
        policy = logps(roles.policy)
        with roles.reference() as reference:
            assert (logps(reference) - policy).abs().max() <= (1e-5 if "PiSSA" in way else 0)
        known = logps(load_policy(source_of(parent), quantize=changes.get("quantize"), precision="float32"))
        assert (known - policy).abs().max() < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_the_reference_stays_when_the_policy_moves(way: str, tiny_llama: Path, tmp_path: Path) -> None:
    parent, changes = parents(tiny_llama, tmp_path)[way]
    roles = opened(parent, tmp_path, **changes)
    with roles.reference() as reference, torch.no_grad():
        before = logps(reference)
    _step(roles, logps(roles.policy).sum() + _values(roles).sum())
    with torch.no_grad():
        with roles.reference() as reference:
            assert torch.equal(logps(reference), before)
        assert (logps(roles.policy) - before).abs().max() > 1e-3


@pytest.mark.parametrize("value", ["adapter", "model", "trunk"])
def test_gradients_go_where_they_belong(value: str, tiny_llama: Path, tmp_path: Path) -> None:
    roles = opened(tiny_llama, tmp_path, adapter=LORA, value=value)
    if roles.value_head is not None:
        torch.nn.init.ones_(roles.value_head.weight)
    owners = {"policy": set(_names(roles, ".default.")), "value": set(roles.value_names)}
    logps(roles.policy).sum().backward()
    assert _moved(roles) == owners["policy"] - _still(roles)
    roles.zero_grad()
    _values(roles).sum().backward()
    reached = owners["value"] | (owners["policy"] if value == "trunk" else set())
    assert _moved(roles) == reached - _still(roles)
    assert {name for name, p in roles.named_parameters() if p.requires_grad} == owners["policy"] | owners["value"]


def test_both_adapters_learn_in_one_step_and_the_base_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    roles = opened(tiny_llama, tmp_path, adapter=LORA)
    before = {name: weight.detach().clone() for name, weight in roles.named_parameters()}
    for _ in range(3):
        _step(roles, logps(roles.policy).square().sum() + (_values(roles) - 1).square().sum())
    moved = {name for name, weight in roles.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in roles.named_parameters() if weight.requires_grad}


def test_a_new_value_head_predicts_nothing_yet(tiny_llama: Path, tmp_path: Path) -> None:
    for value in ("adapter", "model", "trunk"):
        roles = opened(tiny_llama, tmp_path, adapter=LORA, value=value)
        assert torch.equal(_values(roles), torch.zeros(17))


@pytest.mark.parametrize("adapter", [True, False])
def test_the_value_model_starts_from_the_reward_model_where_it_fits(
    adapter: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    reward = reward_of(tiny_llama, tmp_path / "reward", adapter=adapter)
    roles = opened(tiny_llama, tmp_path, reward, value="adapter" if adapter else "model", adapter=LORA)
    scores = RewardModel.open(source_of(reward))
    ends = torch.tensor([len(row) for row in ROWS]).cumsum(0) - 1
    with torch.no_grad():
        known = torch.stack([_score(scores.model, row) for row in ROWS])
        assert torch.allclose(_values(roles)[ends], known, atol=1e-4)


def test_a_reward_adapter_on_the_policys_base_gives_what_align_score_gives(tiny_llama: Path, tmp_path: Path) -> None:
    base = chat_base(tiny_llama, tmp_path / "base")
    for quantize in (None, "nf4"):
        reward = source_of(reward_of(base, tmp_path / f"reward-{quantize}", adapter=True, quantize=quantize))
        policy = source_of(adapter_of(base, tmp_path / f"policy-{quantize}", quantize=quantize))
        model: Any = load_policy(policy, trainable=True, precision="float32")
        assert fits_policy(reward, model)
        shared = AdapterReward(model, "reward", put_reward_adapter(model, "reward", reward, trainable=False))
        pairs = [(prompt.messages, said("figs at dawn" * (1 + n))) for n, prompt in enumerate(prompts(4))]
        outside = RewardModel.open(reward)
        inside = RewardModel(shared, context_encoder(shared, outside.encoder.tokenizer))
        before = logps(model)
        assert inside.score(pairs) == pytest.approx(outside.score(pairs), abs=1e-5)
        assert torch.equal(logps(model), before)  # the policy is active again


def test_a_reward_adapter_on_another_base_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    reward = source_of(reward_of(tiny_llama, tmp_path / "reward", adapter=True, quantize="nf4"))
    plain: Any = load_policy(
        source_of(adapter_of(tiny_llama, tmp_path / "policy")), trainable=True, precision="float32"
    )
    assert not fits_policy(reward, plain)
    whole = source_of(reward_of(tiny_llama, tmp_path / "whole"))
    assert not fits_policy(whole, plain)


def test_what_cannot_be_combined_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="value: adapter needs a policy that is an adapter"):
        opened(tiny_llama, tmp_path, value="adapter")
    reward = reward_of(tiny_llama, tmp_path / "reward")
    with pytest.raises(AlignError, match="no reward model is an adapter on the policy's base"):
        opened(tiny_llama, tmp_path, reward, adapter=LORA, value={"kind": "adapter", "start": "reward"})


@pytest.mark.parametrize("value", ["adapter", "trunk", "model"])
def test_recomputed_activations_give_the_same_gradients(value: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The backward pass runs each layer once more, long after the value model's adapter was switched off again."""
    parent = adapter_of(tiny_llama, tmp_path / "parent")
    found = []
    for again in (False, True):
        roles = opened(parent, tmp_path / str(again), value=value, gradient_checkpointing=again).train()
        assert roles.value_head is not None
        torch.nn.init.ones_(roles.value_head.weight)
        with torch.no_grad():
            for name, weight in roles.named_parameters():
                if "lora_B.value" in name:
                    weight.neg_()  # another adapter than the policy's
        (logps(roles.policy).sum() + _values(roles).square().sum()).backward()
        found.append({name: p.grad for name, p in roles.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all((found[0][name] - found[1][name]).norm() <= 1e-4 * found[0][name].norm() for name in found[0])


def test_the_dropout_of_the_parents_adapter_is_not_taken_over(tiny_llama: Path, tmp_path: Path) -> None:
    roles = opened(adapter_of(tiny_llama, tmp_path / "parent", dropout=0.5), tmp_path).train()
    assert roles.value_head is not None
    torch.nn.init.ones_(roles.value_head.weight)
    assert torch.equal(_values(roles), _values(roles))


def test_rows_of_added_tokens_learn_at_the_rate_of_their_owner(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source_of(tiny_llama))
    prepare_tokenizer(tokenizer, None)
    roles = RoleOpener(settings(adapter=LORA), source_of(tiny_llama), None, tokenizer, 0, tmp_path).open()
    assert any("trainable_tokens" in name for name in roles.value_names)
    trained = {name for name, p in roles.named_parameters() if p.requires_grad}
    assert set(roles.value_names) == {name for name in trained if "default" not in name}


def test_a_new_dora_adapter_in_bfloat16_is_its_own_reference(tiny_llama: Path, tmp_path: Path) -> None:
    roles = opened(tiny_llama, tmp_path, adapter={**LORA, "dora": True}, precision="bfloat16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy = logps(roles.policy)
        with roles.reference() as reference:
            assert torch.equal(logps(reference), policy)


def test_a_policy_with_roles_decodes_without_padding(tiny_llama: Path, tmp_path: Path) -> None:
    roles = opened(tiny_llama, tmp_path, adapter=LORA)
    assert refill.suits(roles.policy)
    ids = [1, 9, 8, 7, 30]
    with torch.no_grad():
        (reply,) = generate(
            roles.policy, load_tokenizer(source_of(tiny_llama)), [ids], Sampling(8, temperature=1.0), stop_ids=[2]
        )
        row = [[*ids, *reply.ids]]
        states = hidden_states(roles.policy, row)[len(ids) - 1 : -1]
        known = target_logps(roles.policy, states, torch.tensor(reply.ids))[0]
    assert reply.logps == pytest.approx(known.tolist(), abs=1e-4)


def _values(roles: Roles) -> torch.Tensor:
    return roles.values(ROWS, torch.arange(sum(map(len, ROWS))))


def _score(model: Any, row: list[int]) -> torch.Tensor:
    from align.batches import Batch
    from align.models.rewards import reward_scores

    ids = torch.tensor([row])
    return reward_scores(model, Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool()))[0]


def _step(roles: Roles, loss: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in roles.parameters() if p.requires_grad], lr=1e-2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _names(roles: Roles, part: str) -> list[str]:
    return [name for name, _ in roles.named_parameters() if part in name]


def _moved(roles: Roles) -> set[str]:
    return {name for name, p in roles.named_parameters() if p.grad is not None and bool(p.grad.any())}


def _still(roles: Roles) -> set[str]:
    """A of a new adapter has no gradient while its B is 0."""
    fresh = {name for name, p in roles.named_parameters() if "lora_B" in name and not bool(p.any())}
    return {name.replace("lora_B", "lora_A") for name in fresh}
