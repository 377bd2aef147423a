"""Another engine in the ppo stage: weights synced each round, the mismatch measured, and corrected by importance weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from align.errors import AlignError
from align.ppo.objective import PpoLoss
from align.stages import ppo
from tests import vllm_stand_in
from tests.ppo_kit import Listener, chat_base, inputs, settings


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tiny_llama, tmp_path_factory.mktemp("base"))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type:
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm_stand_in.LLM.made.clear()
    return vllm_stand_in.LLM


def run(base: Path, work: Path, **changes: object) -> Listener:
    heard = Listener()
    ppo.run(settings(engine="vllm", rounds=3, **changes), inputs(base, work), work / "out", heard)
    return heard


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_an_exact_engine_shows_no_mismatch_in_any_round(adapter: object, base: Path, tmp_path: Path) -> None:
    """Weights that were not synced would show from the second round on."""
    heard = run(base, tmp_path, adapter=adapter, learning_rate=1e-2)
    assert len(heard.series("round.mismatch")) == 3
    assert max(heard.series("round.mismatch")) < 1e-4


def test_a_distorted_engine_is_measured_and_corrected(
    vllm: type, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "noise", 0.5)
    seen: list[torch.Tensor] = []
    begin = PpoLoss._begin

    def watched(self: PpoLoss, roles: object, number: int) -> None:
        begin(self, roles, number)
        seen.append(self._now.weights)

    monkeypatch.setattr(PpoLoss, "_begin", watched)
    heard = run(base, tmp_path, importance_cap=1.5)
    assert min(heard.series("round.mismatch")) > 0.1
    weights = torch.cat([table[table > 0] for table in seen])
    assert weights.max() == 1.5
    assert weights.min() < 0.9
    assert heard.series("round.kl")[0] == 0  # the proof holds: old log-probabilities are the trained model's


def test_an_engine_that_is_not_installed_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="vllm"):
        run(base, tmp_path)
