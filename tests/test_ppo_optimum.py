"""Two decision problems whose optimum is known are solved: the loop goes to the policy that theory says, and stays there.

With a reward r on whole responses and a price b on the KL, the best policy is reference * exp(r / b), normalised (Ziegler
2019; Rafailov 2023, eq. 4). Where r is 1 on a set of responses and 0 elsewhere, its mass p on that set becomes
p e^(1/b) / (p e^(1/b) + 1 - p). All responses of one and two tokens are enumerated here, so p and the result are exact.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.chat.encoder import Encoder
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.source import source_of
from align.recipe.settings import AdapterSettings
from align.stages import ppo
from tests.ppo_kit import Listener, chat_base, inputs, prompts, settings


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings as large as trained ones are: on smaller ones a frozen head hardly tells tokens apart."""
    folder = chat_base(tiny_llama, tmp_path_factory.mktemp("base"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mass(folder: Path, pattern: str, tokens: int) -> float:
    """Probability that a response of so many tokens matches."""
    model = load_policy(source_of(folder), precision="float32")
    tokenizer: Any = load_tokenizer(source_of(folder))
    ids = Encoder(tokenizer, max_length=256).prompt(prompts(1)[0].messages)
    total = 0.0
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        if tokens == 1:
            seconds = torch.ones(len(first), 1)
        else:
            rows = torch.tensor([[*ids, token] for token in range(len(first))])
            seconds = model(rows).logits[:, -1].softmax(-1)
    for one, share in enumerate(first.tolist()):
        if one == tokenizer.eos_token_id:
            continue  # it ends the response, which is then empty
        for two in range(seconds.shape[1]):
            said = [one] if tokens == 1 or two == tokenizer.eos_token_id else [one, two]
            if re.search(pattern, tokenizer.decode(said, skip_special_tokens=True)):
                total += share * float(seconds[one, two])
    return total


def optimum(p: float, price: float) -> float:
    """Mass of the best policy on what is rewarded, where the reference has p."""
    return p * math.exp(1 / price) / (p * math.exp(1 / price) + 1 - p)


@pytest.mark.parametrize(
    ("pattern", "tokens", "price", "changes"),
    [
        ("[a-m]", 1, 0.4, {"value": "trunk"}),
        ("[a-m]", 1, 0.4, {"estimator": {"kind": "rloo", "samples": 4}}),
        ("[a-m]", 1, 0.4, {"estimator": "reinforce++", "kl_in": "loss", "whiten_advantages": False}),
        ("[a-z].*[a-z]", 2, 0.5, {"value": "model"}),
    ],
    ids=["bandit, gae", "bandit, rloo", "bandit, kl in the loss", "two tokens, gae"],
)
def test_the_policy_goes_to_the_optimum_that_theory_says(
    pattern: str, tokens: int, price: float, changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    before = mass(base, pattern, tokens)
    best = optimum(before, price)
    assert before + 0.3 < best < 0.95, "the problem is neither solved at the start nor degenerate"
    plain: dict[str, Any] = {
        "max_new_tokens": tokens, "kl_coefficient": price, "rollouts": 128, "batch_size": 128, "rounds": 30,
        "learning_rate": 3e-3, "schedule": "linear", "log_steps": 100, "measure_rounds": 100,
    }  # fmt: skip
    made = settings(reward={"kind": "regex", "pattern": pattern}, **(plain | changes))
    ppo.run(made, inputs(base, tmp_path, rows=prompts(1)), tmp_path / "out", Listener())
    assert mass(tmp_path / "out", pattern, tokens) == pytest.approx(best, abs=0.08)


def test_adapters_go_to_the_best_that_adapters_can_reach(base: Path, tmp_path: Path) -> None:
    """A frozen head bounds what an adapter can say, so the optimum is found by exact gradients on the same adapter."""
    adapter = {"rank": 16}
    before, best = mass(base, "[a-m]", 1), best_adapter(base, "[a-m]", 0.4)
    assert best > before + 0.1
    made = settings(
        reward={"kind": "regex", "pattern": "[a-m]"}, max_new_tokens=1, kl_coefficient=0.4, rollouts=128,
        batch_size=128, rounds=40, learning_rate=1e-2, schedule="linear", log_steps=100, measure_rounds=100,
        adapter=adapter, value="adapter",
    )  # fmt: skip
    ppo.run(made, inputs(base, tmp_path, rows=prompts(1)), tmp_path / "out", Listener())
    assert mass(tmp_path / "out", "[a-m]", 1) == pytest.approx(best, abs=0.04)


def best_adapter(base: Path, pattern: str, price: float) -> float:
    """Mass of what matches, where an adapter maximises reward less priced KL exactly."""
    tokenizer: Any = load_tokenizer(source_of(base))
    ids = torch.tensor([Encoder(tokenizer, max_length=256).prompt(prompts(1)[0].messages)])
    said = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    reward = torch.tensor([float(re.search(pattern, text) is not None) for text in said])
    model = load_policy(
        source_of(base), adapter=AdapterSettings(rank=16), trainable=True, precision="float32"
    )  # fmt: skip
    with torch.no_grad():
        reference = model(ids).logits[0, -1].log_softmax(-1)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(60):
        logps = model(ids).logits[0, -1].log_softmax(-1)
        optimizer.zero_grad()
        (logps.exp() * (price * (logps - reference) - reward)).sum().backward()
        optimizer.step()
    return float((logps.exp() * reward).sum())
