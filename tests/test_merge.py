"""Merging: the plain folder on disk is the model that was trained, whatever kind of adapter and base made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.cli.merge import merge_command
from align.data.examples import Document
from align.data.prepared import DataReport, PreparedData, write_prepared
from align.errors import AlignError, CheckFailed
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.merging import MergeVerdict, choose_base, materialize, merge
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.registry import DataRecord, DataUse, Registry
from tests.test_models_training import IDS, WAYS, logits, save, train

ROWS = IDS.tolist()
QUICK = ["lora", "dora", "pissa", "nf4"]
ADAPTERS = [way for way in WAYS if way != "full"]
WEIGHTS = {"adapter_config.json", "adapter_model.safetensors", "align_adapter.json"}


def trained(base: Path, folder: Path, way: str, steps: int = 8) -> Path:
    model = load_policy(source_of(base), trainable=True, **WAYS[way])
    train(model, steps=steps, rate=1e-2)
    return save(model, folder, base)


@pytest.mark.parametrize(
    "way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in ADAPTERS]
)
@pytest.mark.parametrize("model", ["tiny_llama", pytest.param("tiny_gpt2", marks=pytest.mark.slow)])
def test_a_merged_model_is_the_adapter_on_its_training_base(
    way: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if model == "tiny_gpt2" and way == "gaussian":
        pytest.skip("GPT-2 has no q_proj")
    base = request.getfixturevalue(model)
    adapter = source_of(trained(base, tmp_path / "adapter", way))
    verdict = merge(adapter, tmp_path / "merged", rows=ROWS)
    tuned, start = logits(load_policy(adapter)), logits(load_policy(source_of(base)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    effect, error = (tuned - start).abs().mean(), (logits(plain) - tuned).abs().mean()
    assert error < 0.05 * effect if "bfloat16" not in way else error < 0.2 * effect
    assert verdict.holds
    assert verdict.kl < (1e-3 if "bfloat16" in way else 1e-6)
    assert verdict.into == ("dequantized" if adapter.quantize else "original")
    assert verdict.compared == IDS.numel()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not WEIGHTS & {file.name for file in (tmp_path / "merged").iterdir()}
    assert source_of(tmp_path / "merged").kind == "model"


@pytest.mark.parametrize("way", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_original_base_is_further_away_than_the_dequantized_one(way: str, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = source_of(trained(tiny_llama, tmp_path / "adapter", way))
    original = merge(adapter, tmp_path / "original", rows=ROWS, into="original")
    dequantized = merge(adapter, tmp_path / "dequantized", rows=ROWS, into="dequantized")
    assert original.kl > 10 * dequantized.kl
    assert not merge(adapter, tmp_path / "strict", rows=ROWS, into="original", max_kl=original.kl / 2).holds


def test_a_real_pretrained_model_merges_within_its_bound(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "stories260K"
    adapter = source_of(trained(base, tmp_path / "adapter", "nf4"))
    rows = [load_tokenizer(adapter)("Once upon a time there was a little dog named Max.").input_ids]
    assert merge(adapter, tmp_path / "merged", rows=rows).kl < 1e-6
    assert merge(adapter, tmp_path / "original", rows=rows, into="original").kl > 1e-3
    tokenizer = load_tokenizer(source_of(tmp_path / "merged"))
    assert tokenizer.get_vocab() == load_tokenizer(adapter).get_vocab()


def test_a_merge_is_kept_in_the_dtype_of_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer(source_of(tiny_llama)).save_pretrained(tmp_path / "half")
    adapter = source_of(trained(tmp_path / "half", tmp_path / "adapter", "lora"))
    verdict = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert 0 < verdict.kl < 1e-3


def test_the_template_goes_with_the_merged_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS["lora"])
    tokenizer = load_tokenizer(source_of(tiny_llama))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    save_checkpoint(model, tokenizer, tmp_path / "adapter")
    merge(source_of(tmp_path / "adapter"), tmp_path / "merged", rows=ROWS)
    assert load_tokenizer(source_of(tmp_path / "merged")).chat_template == tokenizer.chat_template
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_a_reward_adapter_merges_into_a_plain_reward_model(tiny_llama: Path, tmp_path: Path) -> None:
    model: Any = load_reward(source_of(tiny_llama), trainable=True, **WAYS["nf4"])
    train_reward(model)
    adapter = source_of(save(model, tmp_path / "adapter", tiny_llama))
    verdict = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert verdict.holds
    assert verdict.kl < 1e-6
    assert verdict.compared == len(ROWS) - 1
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-4, rtol=0)
    assert source_of(tmp_path / "merged").kind == "reward"


def train_reward(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        scores = model(IDS, use_cache=False).logits[:, 0]
        (-torch.nn.functional.logsigmoid(scores[0] - scores[1:])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_plain_source_is_its_own_plain_form(tiny_llama: Path, tmp_path: Path) -> None:
    source = source_of(tiny_llama)
    assert materialize(source, tmp_path / "unused") is source
    assert not (tmp_path / "unused").exists()


def test_what_cannot_be_merged_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="not an adapter"):
        merge(source_of(tiny_llama), tmp_path / "merged", rows=ROWS)
    adapter = source_of(trained(tiny_llama, tmp_path / "adapter", "lora", steps=1))
    with pytest.raises(AlignError, match="no record that its base was quantized"):
        choose_base(adapter, "dequantized")
    with pytest.raises(AlignError, match="no text to compare"):
        merge(adapter, tmp_path / "merged", rows=[])


@pytest.mark.parametrize(("kl", "holds"), [(0.04, True), (0.05, True), (0.06, False), (float("nan"), False)])
def test_a_verdict_holds_only_for_a_number_within_the_bound(kl: float, holds: bool) -> None:
    assert MergeVerdict(kl, 1.0, 10, "original", "asked for", 0.05).holds is holds


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    return trained(base, tmp_path / "adapter", "nf4")


def test_the_command_says_which_base_it_chose_and_why(adapter: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(merge_command, [str(adapter), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    for words in ("dequantized", "trained on this base in nf4", "KL", "agreement"):
        assert words in done.stdout
    assert source_of(tmp_path / "out").kind == "model"


def test_the_command_speaks_json(adapter: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(merge_command, [str(adapter), "--out", str(tmp_path / "out"), "--json"])
    verdict = json.loads(done.stdout)
    assert verdict["holds"] is True
    assert verdict["into"] == "dequantized"
    assert verdict["path"] == str(tmp_path / "out")


def test_above_the_bound_the_command_fails_as_a_check_and_keeps_the_folder(adapter: Path, tmp_path: Path) -> None:
    words = [str(adapter), "--out", str(tmp_path / "out"), "--into", "original", "--max-kl", "1e-9"]
    with pytest.raises(CheckFailed, match="above the bound") as caught:
        CliRunner().invoke(merge_command, words, catch_exceptions=False, standalone_mode=False)
    assert caught.value.exit_code == 3
    assert source_of(tmp_path / "out").kind == "model"


def test_a_folder_that_holds_something_is_never_written_into(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(AlignError, match="not empty"):
        CliRunner().invoke(
            merge_command, [str(adapter), "--out", str(tmp_path / "out")], catch_exceptions=False, standalone_mode=False
        )
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_verdict_is_measured_on_the_text_that_is_given(adapter: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"The heron carried {n} crates of figs."}) + "\n" for n in range(9)))
    done = CliRunner().invoke(
        merge_command, [str(adapter), "--out", str(tmp_path / "out"), "--data", str(data), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["text"] == str(data)


def registered(base: Path) -> DataRecord:
    """A registered adapter, toy/adapter, and the data that it was trained on."""
    registry = Registry.open()
    rows = [Document(f"The heron carried {n} crates of figs.") for n in range(4)]
    aside = registry.new_folder("data")
    write_prepared(PreparedData("text", rows, rows[:2], DataReport()), aside)
    data = registry.add_data("toy/figs", "key", aside, {})
    run = registry.begin_run(recipe="toy", stage="adapter", kind="sft", key="k", settings={}, inputs={}, seed=0)
    with run:
        trained(base, run.artifact, "lora", steps=1)
        use = DataUse("figs", data.id, 4)
        run.finish_checkpoint(name="toy/adapter", kind="adapter", parents=[], data=[use], metrics={}, versions={})
    return data


def test_a_registered_adapter_is_measured_on_the_held_out_rows_it_was_trained_with(
    tiny_llama: Path, tmp_path: Path
) -> None:
    registered(tiny_llama)
    done = CliRunner().invoke(
        merge_command, ["toy/adapter", "--out", str(tmp_path / "out")], catch_exceptions=False, standalone_mode=False
    )
    assert "the held-out rows of toy/figs" in done.stdout


@pytest.mark.parametrize("name", ["test.jsonl", "report.json"])
def test_rows_that_were_edited_behind_the_registry_are_not_measured_on(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = registered(tiny_llama).path / name
    file.chmod(0o644)
    file.write_text('{"x": 1}\n')
    with pytest.raises(AlignError, match=rf"data set toy/figs .*{name}"):
        CliRunner().invoke(
            merge_command,
            ["toy/adapter", "--out", str(tmp_path / "out")],
            catch_exceptions=False,
            standalone_mode=False,
        )
    assert not (tmp_path / "out").exists()
