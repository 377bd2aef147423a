"""Weights that are infinite or NaN are refused with tensor and file, whoever loads them; all others pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.checks import check_recipe
from align.cli.use import eval_command, generate_command, score_command
from align.errors import AlignError, StageFailed
from align.models import finite
from align.models.finite import require_finite_weights
from align.models.loading import load_policy, load_reward
from align.models.merging import materialize
from align.models.source import source_of
from align.ppo.proof import outside_scores, probe_texts
from align.progress import Progress
from align.rewards.model import RewardModel
from align.run import checked_plan
from align.stages.critique import open_writer
from tests.ppo_kit import adapter_of, prompts, reward_of
from tests.test_cli_use import PAIRS, invoke, rows_file
from tests.test_run import Bench, bench_in

DOWN = "model.layers.1.mlp.down_proj.weight"
NAN, INFINITE = float("nan"), float("inf")
KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def spoil(file: Path, name: str = DOWN, value: float = NAN, place: int = -1) -> None:
    """Puts a value into one place of one weight."""
    tensors = load_file(file)
    tensors[name].view(-1)[place] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def spoilt(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model with one NaN."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "spoilt"))
    spoil(folder / "model.safetensors")
    return folder


@pytest.fixture
def words() -> str:
    return rf"spoilt/model.safetensors: not all weights are finite: {DOWN} holds NaN"


# Files ---------------------------------------------------------------------------------------------------------------


def model_of(folder: Path, tensors: dict[str, Tensor]) -> Any:
    """A source of these tensors; nothing that could be loaded."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return source_of(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "said"), [(NAN, "NaN"), (-NAN, "NaN"), (INFINITE, "infinity"), (-INFINITE, "infinity")]
)
@pytest.mark.parametrize("place", [0, 4095, 4096, 9999])
def test_one_value_of_any_kind_of_float_is_found_wherever_it_stands(
    kind: str, value: float, said: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are small here, so that places lie on both sides of a seam."""
    monkeypatch.setattr(finite, "PIECE", 4096)
    tensors = {"first": torch.ones(3, dtype=KINDS[kind]), "second": torch.ones(100, 100, dtype=KINDS[kind])}
    tensors["second"].view(-1)[place] = value
    with pytest.raises(AlignError, match=f"second holds {said}"):
        require_finite_weights(model_of(tmp_path / "model", tensors))


def test_all_other_numbers_pass(tmp_path: Path) -> None:
    """The largest ones, denormal ones, zeros of both signs, nothing at all, and integers whose bits would be those of NaN."""
    tensors = {}
    for name, kind in KINDS.items():
        edge = torch.finfo(kind)
        tensors[name] = torch.tensor([edge.max, edge.min, edge.tiny / 2, 0.0, -0.0, 1.0], dtype=kind)
        tensors[f"{name}.empty"] = torch.empty(0, 4, dtype=kind)
    tensors |= {f"int{n}": torch.full((5,), -1, dtype=kind) for n, kind in enumerate((torch.int8, torch.int64))}
    tensors["truth"] = torch.tensor([True])
    require_finite_weights(model_of(tmp_path / "model", tensors))


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path: Path) -> None:
    source = model_of(tmp_path / "model", {"w": torch.ones(8)})
    before = finite._first_fault.cache_info()
    for _ in range(3):
        require_finite_weights(source)
    assert finite._first_fault.cache_info().misses == before.misses + 1
    spoil(tmp_path / "model" / "model.safetensors", "w")
    with pytest.raises(AlignError, match="w holds NaN"):
        require_finite_weights(source)


def test_the_shard_that_holds_it_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="200KB")
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][DOWN]
    require_finite_weights(source_of(folder))
    spoil(folder / shard)
    with pytest.raises(AlignError, match=f"{shard}: .*{DOWN}"):
        require_finite_weights(source_of(folder))


def test_the_file_that_is_loaded_is_the_one_that_is_looked_into(tiny_llama: Path, tmp_path: Path) -> None:
    """Beside an index of good shards, transformers takes model.safetensors, whatever the index says."""
    folder = tmp_path / "both"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="200KB")
    shutil.copy(tiny_llama / "model.safetensors", folder)
    spoil(folder / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.isfinite(loaded.get_parameter(DOWN)).all()
    with pytest.raises(AlignError, match=f"model.safetensors: .*{DOWN}"):
        require_finite_weights(source_of(folder))


def test_a_buffer_that_nothing_reads_may_be_infinite(tiny_llama: Path, tmp_path: Path) -> None:
    """GPT-NeoX, GPT-J and CodeGen saved -1e9 as masked_bias, in float16 too."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.attention.masked_bias"] = torch.tensor(-1e9).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    require_finite_weights(source_of(folder))


def test_a_file_that_is_damaged_since_it_was_looked_at_is_refused_in_words(tiny_llama: Path, tmp_path: Path) -> None:
    source = source_of(Path(shutil.copytree(tiny_llama, tmp_path / "model")))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    with pytest.raises(AlignError, match="cannot be opened"):
        load_policy(source)


# Who loads them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", [{}, {"trainable": True}, {"quantize": "nf4"}, {"quantize": "int8"}, {"precision": "bfloat16"}], ids=str
)
def test_a_model_is_refused_however_it_is_loaded(way: dict[str, Any], spoilt: Path, words: str) -> None:
    """Also where it is quantized, after which it could not be seen."""
    with pytest.raises(AlignError, match=words) as refused:
        load_policy(source_of(spoilt), **way)
    assert refused.value.exit_code == 2
    assert refused.value.hint


def test_a_reward_model_is_refused(tiny_llama: Path, spoilt: Path, words: str, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match=words):
        load_reward(source_of(spoilt), trainable=True)
    folder = reward_of(tiny_llama, tmp_path / "reward")
    spoil(folder / "model.safetensors", "score.weight", INFINITE)
    with pytest.raises(AlignError, match=r"reward/model.safetensors: .*score.weight holds infinity"):
        RewardModel.open(source_of(folder))


def test_an_adapter_and_its_base_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "spoilt"))
    folder = adapter_of(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    name, whole = next(iter(load_file(file))), file.read_bytes()
    spoil(file, name, INFINITE)
    for load in (load_policy, lambda source: materialize(source, tmp_path / "merged")):
        with pytest.raises(AlignError, match=rf"adapter_model.safetensors: .*{name} holds infinity"):
            load(source_of(folder))
    file.write_bytes(whole)
    spoil(base / "model.safetensors")
    with pytest.raises(AlignError, match=f"spoilt/model.safetensors: .*{DOWN} holds NaN"):
        load_policy(source_of(folder))


def test_generate_eval_score_and_critique_refuse_it(spoilt: Path, words: str, tiny_llama: Path, tmp_path: Path) -> None:
    data = rows_file(tmp_path, PAIRS)
    for command, *arguments in (
        (generate_command, spoilt, "--prompt", "hello"), (eval_command, spoilt, "--data", data)
    ):  # fmt: skip
        with pytest.raises(AlignError, match=words):
            invoke(command, *arguments)
    with pytest.raises(AlignError, match=words):
        open_writer(source_of(spoilt), Progress())
    folder = reward_of(tiny_llama, tmp_path / "reward")
    spoil(folder / "model.safetensors", "score.weight")
    with pytest.raises(AlignError, match=r"score.weight holds NaN"):
        invoke(score_command, folder, "--data", data)


def test_a_check_and_a_run_refuse_it_before_anything_is_made(spoilt: Path, words: str, tmp_path: Path) -> None:
    bench: Bench = bench_in(tmp_path, spoilt)
    for look in (check_recipe, checked_plan):
        with pytest.raises(AlignError, match=f"stage 'sft': .*{words}"):
            look(bench.workshop())


def test_a_model_that_is_trained_from_scratch_is_not_asked_for_its_weights(spoilt: Path, tmp_path: Path) -> None:
    bench: Bench = bench_in(tmp_path, spoilt)
    scratch = (
        "stages={begun: {kind: pretrain, data: talk, from_scratch: true}}",
        "data={talk: {path: begun.jsonl, test_fraction: 0.2}}", "evaluation.prompts=null",
    )  # fmt: skip
    rows = [json.dumps({"text": f"The heron came to pier {number}."}) + "\n" for number in range(20)]
    (tmp_path / "begun.jsonl").write_text("".join(rows))
    check_recipe(bench.workshop(*scratch))


# Numbers that a model with finite weights gives ----------------------------------------------------------------------


def test_ppo_says_that_a_reward_model_gives_rewards_that_are_not_finite(tiny_llama: Path, tmp_path: Path) -> None:
    folder = reward_of(tiny_llama, tmp_path / "reward")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"score.weight": torch.full_like(tensors["score.weight"], 3e38)}, file, {"format": "pt"})
    probes = probe_texts(prompts(4))
    with pytest.raises(
        StageFailed, match=r"reward model 'judge': the model gives rewards that are not finite to 4 of 4 rows"
    ) as failure:
        outside_scores({"judge": source_of(folder)}, probes)
    assert "bug" not in failure.value.hint
