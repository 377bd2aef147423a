"""The roles of policy optimisation - policy, reference, value, reward - on as few weights as they need.

Where the policy is an adapter, the others are adapters on the same frozen base, full precision or 4-bit: the reference is
the base alone (a new adapter) or a frozen copy of the adapter that training starts from, the value model a second adapter
with a head, and a reward model that is an adapter on that base joins them. Where all weights train, reference and value
model are models of their own. The reference is always what the stage starts from, whatever that was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.models.adapters import OFF, copy_adapter, fits_policy, is_adapted, put_reward_adapter, using
from align.models.folders import load_tokenizer
from align.models.head import check_head
from align.models.loading import load_policy, load_reward
from align.models.merging import materialize
from align.models.opening import silence_dropout
from align.models.source import Source
from align.models.trunk import hidden_states, inner_model, trunk_of
from align.recipe.ppo_settings import GaeEstimator, PpoSettings

REFERENCE, VALUE = "reference", "value"
ValueKind = Literal["adapter", "model", "trunk"]


class Roles(nn.Module):
    """Policy and value model as one module that trains; the frozen reference is used by it and not part of it."""

    def __init__(
        self, policy: nn.Module, reference: nn.Module | str, value: nn.Module | str | None, head: nn.Module | None
    ) -> None:
        """reference: a model, or the name of the policy's adapter that it is. value: likewise; None: the policy's trunk.

        head: of the value model, (H) -> (1); None where there is no value model.
        """
        super().__init__()
        self.policy = policy
        self.value_model = value if isinstance(value, nn.Module) else None
        self.value_adapter = value if isinstance(value, str) else None
        self.value_head = head
        self._reference = [reference]  # in a list, so that it is no part of this module
        self._is_valuing = False

    @property
    def config(self) -> Any:
        """The policy's config."""
        return self.policy.config

    @property
    def shares_trunk(self) -> bool:
        """Whether the value head reads the policy's own hidden states."""
        return self.value_head is not None and self.value_model is None and self.value_adapter is None

    @property
    def value_names(self) -> list[str]:
        """Names of the parameters that only the value model has; none where there is no value model."""
        own = ("value_model.", "value_head.")
        return [
            name for name, _ in self.named_parameters()
            if name.startswith(own) or self.value_adapter in name.split(".")[-2:]  # lora_A.value.weight, delta.value
        ]  # fmt: skip

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference, to be used in this block."""
        (found,) = self._reference
        if isinstance(found, nn.Module):
            yield found
        else:
            with using(self.policy, found):
                yield self.policy

    def values(self, rows: Sequence[Sequence[int]], places: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Values (M,), float32, at `places` among all tokens of the rows, one row after the other.

        hidden: the policy's hidden states of the rows, where they are known and the value head reads them.
        """
        assert self.value_head is not None, "this estimator has no value model"
        if self.shares_trunk:
            states = hidden_states(self.policy, rows) if hidden is None else hidden
        elif self.value_adapter is not None:
            with using(self.policy, self.value_adapter), self._valuing():
                states = hidden_states(self.policy, rows)
        else:
            states = hidden_states(cast(nn.Module, self.value_model), rows)
        chosen = states[places]
        with torch.autocast(chosen.device.type, enabled=False):
            found: Tensor = self.value_head(chosen.float())
        return found.squeeze(-1)

    def checkpoint_activations(self) -> None:
        """Recompute the policy's activations in the backward pass, each through the adapter that it first went through."""
        inner_model(self.policy).activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": self._passes}
        )

    def _passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What a layer's forward pass and its recomputation, by then outside of `values`, run in."""
        again = using(self.policy, self.value_adapter) if self._is_valuing and self.value_adapter else nullcontext()
        return nullcontext(), again

    @contextmanager
    def _valuing(self) -> Iterator[None]:
        self._is_valuing = True
        try:
            yield
        finally:
            self._is_valuing = False


class AdapterReward(nn.Module):
    """A reward adapter on the policy's base, in the form of a classifier: a trunk and a `score` head."""

    base_model_prefix = "trunk"

    def __init__(self, policy: nn.Module, name: str, score: Tensor) -> None:
        super().__init__()
        self.trunk = _AdapterTrunk(policy, name)
        self.score = nn.Linear(score.shape[1], 1, bias=False)
        self.score.weight.data = score.to(next(policy.parameters()).device)
        self.score.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The base's config."""
        return self.trunk.policy.config


class _AdapterTrunk(nn.Module):
    def __init__(self, policy: nn.Module, name: str) -> None:
        super().__init__()
        self.policy, self.name = policy, name

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        """As the trunk of a model."""
        trunk = trunk_of(self.policy)
        with using(self.policy, self.name):
            return trunk(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)


@dataclass(frozen=True)
class RoleOpener:
    """What the roles of one run are opened from. reward: the first reward model, for the value model to start from."""

    settings: PpoSettings
    parent: Source
    reward: Source | None
    tokenizer: PreTrainedTokenizerBase
    seed: int
    work: Path

    def open(self) -> Roles:
        """All roles, ready to train. Raises AlignError for what cannot be combined."""
        policy = self._policy()
        check_head(policy)
        reference = self._reference(policy)
        if not isinstance(self.settings.estimator, GaeEstimator):
            return Roles(policy, reference, None, None)
        kind = self._value_kind(policy)
        if kind == "trunk":
            return Roles(policy, reference, None, _new_head(policy))
        if kind == "model":
            classifier: Any = self._value_model()
            head = inner_model(classifier).score
            return Roles(policy, reference, classifier, head)
        roles = Roles(policy, reference, VALUE, self._value_adapter(policy))
        silence_dropout(policy)  # the adapters that were copied bring theirs along
        if self.settings.gradient_checkpointing:
            roles.checkpoint_activations()
        return roles

    def _policy(self) -> nn.Module:
        settings = self.settings
        return load_policy(
            self.parent,
            quantize=settings.quantize,
            adapter=settings.adapter,
            trainable=True,
            tokenizer=self.tokenizer,
            precision=settings.precision,
            seed=self.seed,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    def _reference(self, policy: nn.Module) -> nn.Module | str:
        """What the policy is now, frozen."""
        adapter = self.settings.adapter
        if not is_adapted(policy):
            same = load_policy(self.parent, trainable=True, tokenizer=self.tokenizer, precision=self.settings.precision)
            return same.requires_grad_(False).eval()
        if adapter is not None and adapter.init != "pissa" and not adapter.dora:
            return OFF  # in bfloat16 a new DoRA adapter is the base up to rounding alone
        copy_adapter(policy, REFERENCE, trainable=False)
        return REFERENCE

    def _value_kind(self, policy: nn.Module) -> ValueKind:
        kind = self.settings.value.kind
        if kind == "auto":
            return "adapter" if is_adapted(policy) else "model"
        if kind == "adapter" and not is_adapted(policy):
            raise AlignError(
                "value: adapter needs a policy that is an adapter, and here all weights of the policy train",
                "Add an `adapter:` to the stage, or use value: model or trunk.",
            )
        return kind

    def _value_adapter(self, policy: nn.Module) -> nn.Module:
        """Puts the value model's adapter on the policy's base; returns its head."""
        start, reward = self.settings.value.start, self.reward
        if start != "policy" and reward is not None and fits_policy(reward, policy):
            return _head_of(put_reward_adapter(policy, VALUE, reward, trainable=True), policy)
        if start == "reward":
            raise AlignError(
                "value.start: reward, and no reward model is an adapter on the policy's base in the same precision",
                "Leave it out, or train the reward model with an `adapter:` from what the policy's adapter rests on.",
            )
        copy_adapter(policy, VALUE, trainable=True)
        return _new_head(policy)

    def _value_model(self) -> nn.Module:
        """A value model with weights of its own, as a classifier."""
        start = self.settings.value.start
        from_reward = start != "policy" and self.reward is not None and self._same_tokens(self.reward)
        if start == "reward" and not from_reward:
            raise AlignError(
                "value.start: reward, and there is no reward model with the policy's tokenizer",
                "Leave it out: the value model then starts from the policy.",
            )
        source = self.reward if from_reward and self.reward else materialize(self.parent, self.work / "value-start")
        model: Any = load_reward(
            source, trainable=True, tokenizer=None if from_reward else self.tokenizer,
            precision=self.settings.precision, seed=self.seed,
            gradient_checkpointing=self.settings.gradient_checkpointing,
        )  # fmt: skip
        if not from_reward:
            nn.init.zeros_(cast(Any, inner_model(model)).score.weight)
        return cast(nn.Module, model)

    def _same_tokens(self, source: Source) -> bool:
        return bool(load_tokenizer(source).get_vocab() == self.tokenizer.get_vocab())


def _new_head(policy: nn.Module) -> nn.Module:
    """A head that predicts 0 until it has learnt better (Huang 2024, sec. 4.2)."""
    config: Any = policy.config
    return _head_of(torch.zeros(1, config.get_text_config().hidden_size), policy)


def _head_of(weight: Tensor, policy: nn.Module) -> nn.Module:
    head = nn.Linear(weight.shape[1], 1)
    head.weight.data, head.bias.data = weight.clone(), torch.zeros(1)
    return head.to(next(policy.parameters()).device)
