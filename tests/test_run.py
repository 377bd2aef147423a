"""The chain: each stage starts from what the one before made, unchanged stages are reused, and changed inputs refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from align.batches import pad
from align.chat.encoded import Encoded
from align.chat.templates import template_sha256
from align.errors import AlignError, Interrupted, StageFailed
from align.models.folders import load_tokenizer
from align.models.hardware import device
from align.models.loading import load_policy, load_reward
from align.models.rewards import reward_scores
from align.models.source import source_of
from align.origins import Workshop
from align.plan import plan
from align.progress import Progress
from align.recipe.file import load_recipe
from align.registry import Registry
from align.run import run_recipe
from align.stopping import signals_handled

RECIPE = """
name: harbour
model: {model}
data:
  talk: {{path: talk.jsonl, test_fraction: 0.2}}
  pairs: {{path: pairs.jsonl, test_fraction: 0.2}}
stages:
  sft: {{kind: sft, data: talk, learning_rate: 1.0e-3}}
  adapter: {{kind: sft, from: sft, data: talk, quantize: nf4, adapter: {{kind: lora, rank: 4}}, learning_rate: 1.0e-2}}
  reward: {{kind: reward, from: adapter, data: pairs, learning_rate: 1.0e-3}}
  aligned: {{kind: dpo, from: adapter, data: pairs, beta: 0.1, learning_rate: 1.0e-2}}
  merged: {{kind: merge, from: aligned}}
evaluation: {{prompts: talk, rows: 8, max_new_tokens: 8}}
"""
NAMES = ["Heron", "Gull", "Tern", "Swan", "Crane", "Ibis", "Plover", "Dunlin", "Avocet", "Curlew", "Egret", "Stork"]


@dataclass
class Bench:
    """A recipe with its data in a folder, and the registry it works in."""

    folder: Path
    recipe: Path

    def workshop(self, *overrides: str) -> Workshop:
        registry = Registry.open(self.folder / "home")
        return Workshop(load_recipe(self.recipe, overrides), self.folder, registry)

    def run(self, *overrides: str, progress: Progress | None = None, **named) -> dict[str, tuple[str, str]]:
        done = run_recipe(self.workshop(*overrides), progress or Progress(), **named)
        return {entry.planned.name: (entry.planned.action, entry.checkpoint.id) for entry in done}


def bench_in(folder: Path, model: Path) -> Bench:
    talk = [
        {"messages": [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"{n} is a boat."}]}
        for n in NAMES
    ]
    pairs = [{"prompt": f"Is {n} here?", "chosen": f"Yes, {n} is.", "rejected": f"Go away, {n}!"} for n in NAMES]
    for name, rows in (("talk", talk), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chain.yaml").write_text(RECIPE.format(model=model))
    return Bench(folder, folder / "chain.yaml")


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The whole chain, run once for this file."""
    bench = bench_in(tmp_path_factory.mktemp("chain"), tiny_llama)
    actions = bench.run()
    assert [action for action, _ in actions.values()] == ["run"] * 5
    return bench


def test_every_checkpoint_says_where_it_came_from(done: Bench) -> None:
    registry = done.workshop().registry
    made = {record.stage: record for record in registry.all_checkpoints()}
    assert {name: record.kind for name, record in made.items()} == {
        "sft": "model", "adapter": "adapter", "reward": "reward", "aligned": "adapter", "merged": "model",
    }  # fmt: skip
    assert made["aligned"].parents == made["reward"].parents == (made["adapter"].id,)
    assert made["adapter"].parents == (made["sft"].id,)
    assert [use.name for use in made["aligned"].data] == ["pairs"]
    assert {record.template_sha256 for record in made.values()} == {
        template_sha256(load_tokenizer(source_of(record.path))) for record in made.values()
    }
    assert None not in {record.tokenizer_sha256 for record in made.values()}
    assert made["sft"].versions["torch"] == torch.__version__
    process = {"threads": str(torch.get_num_threads()), "device": str(device())}
    assert [{name: record.versions[name] for name in process} for record in made.values()] == [process] * 5
    assert made["sft"].metrics["after.loss"]["value"] < made["sft"].metrics["before.loss"]["value"]
    assert made["merged"].metrics["merge.holds"] is True
    assert made["sft"].as_dict()["recipe"]["stages"]["sft"]["learning_rate"] == 1e-3


def test_dpo_starts_at_its_reference(done: Bench) -> None:
    registry = done.workshop().registry
    record = registry.checkpoint("harbour/aligned")
    assert record.metrics["before.margin"]["value"] == pytest.approx(0, abs=1e-5)
    assert record.metrics["after.margin"]["value"] > 0
    first = next(row for row in registry.metrics(record.run) if row.name == "train.loss")
    assert (first.step, first.value) == (1, pytest.approx(math.log(2), abs=1e-4))
    log = registry.run(record.run).work / "log.txt"
    assert not log.exists() or "did not start out equal" not in log.read_text()


def test_nothing_changed_nothing_runs(done: Bench) -> None:
    assert {action for action, _ in done.run().values()} == {"reuse"}
    assert [stage.action for stage in plan(done.workshop())] == ["reuse"] * 5


def test_one_dpo_setting_changed_runs_dpo_and_what_follows(done: Bench) -> None:
    actions = {stage.name: (stage.action, stage.why) for stage in plan(done.workshop("stages.aligned.beta=0.2"))}
    assert actions["aligned"] == ("run", "changed: settings.beta 0.1 -> 0.2")
    assert [actions[name][0] for name in ("sft", "adapter", "reward", "merged")] == ["reuse", "reuse", "reuse", "run"]
    ran = done.run("stages.aligned.beta=0.2", stages=["aligned"])
    assert [action for action, _ in ran.values()] == ["reuse", "reuse", "run"]


def test_plain_libraries_open_every_checkpoint(done: Bench) -> None:
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    made = {record.stage: record.path for record in done.workshop().registry.all_checkpoints()}
    tokenizer = AutoTokenizer.from_pretrained(made["merged"])
    row = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_tensors="pt"
    )
    for stage in ("sft", "merged"):
        plain = AutoModelForCausalLM.from_pretrained(made[stage]).eval()(**row).logits
        assert torch.allclose(plain, load_policy(source_of(made[stage]), precision="float32")(**row).logits, atol=1e-5)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(made["sft"], quantization_config=nf4, dtype=torch.float32)
    for module in base.modules():  # bitsandbytes 0.50.2 breaks such layers on processors with AVX-512 bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapted = PeftModel.from_pretrained(base, str(made["aligned"])).eval()(**row).logits
    assert torch.allclose(adapted, load_policy(source_of(made["aligned"]))(**row).logits, atol=1e-5)
    reward = AutoModelForSequenceClassification.from_pretrained(made["reward"]).eval()(**row).logits.squeeze(-1)
    batch = pad([Encoded(row["input_ids"][0].tolist(), [False] * row["input_ids"].shape[1])], 0)
    ours = reward_scores(load_reward(source_of(made["reward"]), precision="float32"), batch)
    assert torch.allclose(reward, ours, atol=1e-5)


def test_the_same_recipe_elsewhere_makes_the_same_bytes(done: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    """Adapters too, whose folders name their base: another home is another path."""
    first, again = done.run(stages=["aligned"]), bench_in(tmp_path, tiny_llama).run(stages=["aligned"])
    assert {name: id_ for name, (_, id_) in again.items()} == {name: id_ for name, (_, id_) in first.items()}


def test_an_adapter_in_a_copied_home_rests_on_the_base_in_that_home(
    done: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for peft alone, from inside the folder."""
    from peft import AutoPeftModelForCausalLM

    made = {record.stage: record.path for record in done.workshop().registry.all_checkpoints()}
    shutil.copytree(done.folder / "home", tmp_path / "home")
    copied = {name: tmp_path / "home" / "checkpoints" / path.name for name, path in made.items()}
    base = source_of(copied["aligned"]).base
    assert base is not None
    assert base.path == str(copied["sft"].resolve())
    monkeypatch.chdir(copied["aligned"])
    opened = AutoPeftModelForCausalLM.from_pretrained(".")
    assert Path(opened.get_base_model().config._name_or_path).resolve() == copied["sft"].resolve()


def test_an_adapter_that_names_the_path_of_its_base_opens(done: Bench, tmp_path: Path) -> None:
    """As those do that were made before bases were named as seen from the adapter."""
    made = {record.stage: record.path for record in done.workshop().registry.all_checkpoints()}
    shutil.copytree(made["adapter"], tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(made["sft"])}))
    row = torch.tensor([[1, 2, 3]])
    old, new = (load_policy(source_of(folder))(row).logits for folder in (tmp_path / "adapter", made["adapter"]))
    assert torch.equal(old, new)


class SignalAt(Progress):
    """Sends SIGTERM to this process at an optimiser step of the first training."""

    def __init__(self, step: int) -> None:
        self.left = step

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[object]:
        outer, training = self, title == "training"

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                outer.left -= int(amount) if training else 0
                if training and amount and outer.left == 0:
                    signal.raise_signal(signal.SIGTERM)

        yield Bar()


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(done: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    many = "stages.sft.epochs=6"
    whole = done.run(many, stages=["sft"])["sft"][1]
    with signals_handled(), pytest.raises(Interrupted):
        bench.run(many, stages=["sft"], progress=SignalAt(2))
    registry = bench.workshop().registry
    assert [run.status for run in registry.all_runs()] == ["interrupted"]
    assert [stage.action for stage in plan(bench.workshop(many), stages=["sft"])] == ["resume"]
    assert bench.run(many, stages=["sft"])["sft"][1] == whole
    steps = [row.step for row in registry.metrics(registry.all_runs()[0].id) if row.name == "eval.loss"]
    assert steps == sorted(set(steps))


def test_an_edited_checkpoint_is_refused_by_the_stage_that_starts_from_it(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    bench.run(stages=["sft"])
    file = bench.workshop().registry.checkpoint("harbour/sft").path / "config.json"
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(AlignError, match=r"config\.json"):
        bench.run()
    assert len(bench.workshop().registry.all_checkpoints()) == 1


def changed(file: Path, old: str, new: str) -> None:
    """Another text in a file of the registry, of the same length."""
    text = file.read_text()
    assert old in text
    assert len(old) == len(new)
    file.chmod(0o644)
    file.write_text(text.replace(old, new))


@pytest.fixture
def copy_of_done(done: Bench, tmp_path: Path) -> Bench:
    """The chain with its registry, to be damaged."""
    folder = Path(shutil.copytree(done.folder, tmp_path / "copy"))
    assert {stage.action for stage in plan(Bench(folder, folder / "chain.yaml").workshop())} == {"reuse"}
    return Bench(folder, folder / "chain.yaml")


def refused(bench: Bench, *overrides: str, **named) -> str:
    """What a run is refused with; nothing may have been begun."""
    before = len(bench.workshop().registry.all_runs())
    with pytest.raises(AlignError) as refusal:
        bench.run(*overrides, **named)
    assert refusal.value.exit_code == 2
    assert len(bench.workshop().registry.all_runs()) == before
    return refusal.value.message


@pytest.mark.parametrize("overrides", [[], ["stages.sft.learning_rate=2.0e-3"]], ids=["reuse", "run"])
def test_registered_data_that_was_edited_is_trained_on_by_no_run(copy_of_done: Bench, overrides: list[str]) -> None:
    changed(copy_of_done.workshop().registry.data("harbour/talk").path / "train.jsonl", "is a boat", "is a goat")
    message = refused(copy_of_done, *overrides, stages=["sft"])
    assert "data set harbour/talk" in message
    assert "changed behind the registry's back: train.jsonl" in message


def test_a_damaged_checkpoint_that_nothing_starts_from_is_not_reused(copy_of_done: Bench) -> None:
    changed(copy_of_done.workshop().registry.checkpoint("harbour/merged").path / "config.json", '"silu"', '"gelu"')
    message = refused(copy_of_done)
    assert "checkpoint harbour/merged" in message
    assert "config.json" in message


@pytest.mark.parametrize("edited", ["adapter", "sft"], ids=["itself", "its base"])
def test_a_damaged_checkpoint_of_another_recipe_is_not_started_from(copy_of_done: Bench, edited: str) -> None:
    registry = copy_of_done.workshop().registry
    adapter = registry.checkpoint("harbour/adapter")
    if edited == "adapter":
        changed(adapter.path / "adapter_config.json", '"r": 4', '"r": 8')
    else:
        changed(registry.checkpoint(adapter.parents[0]).path / "config.json", '"silu"', '"gelu"')
    message = refused(copy_of_done, "name=port", "stages.aligned.from=harbour/adapter", stages=["aligned"])
    assert f"checkpoint harbour/{edited}" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.aligned.data=talk"], "cannot train on data set 'talk': its rows are of kind 'conversation'"),
        (["stages.sft.data=pairs"], "cannot train on data set 'pairs': its rows are of kind 'preference'"),
        (["stages.sft.max_length=100000"], "max_length is 100000, and the model's context is 256 tokens"),
        (["stages.sft.max_length=4"], "none of the .* training rows is left"),
        (["data.talk.path=gone.jsonl"], "gone.jsonl"),
        (["model=nowhere"], "nowhere"),
        (["evaluation.judge=no-judge.yaml"], "no-judge.yaml"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_checkpoint(
    tiny_llama: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    with pytest.raises(AlignError, match=message) as refusal:
        bench.run(*overrides)
    assert refusal.value.exit_code == 2
    assert bench.workshop().registry.all_checkpoints() == []


def test_data_edited_without_a_change_of_size_or_time_runs_again(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    bench.run(stages=["sft"])
    file = tmp_path / "talk.jsonl"
    times = file.stat()
    file.write_text(file.read_text().replace("Heron is a boat", "Heron is a goat"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    (stage,) = plan(bench.workshop(), stages=["sft"])
    assert (stage.action, stage.why) == ("run", "changed: data.talk")


def test_a_reused_checkpoint_is_the_newest_of_its_name_again(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    first = bench.run(stages=["sft"])["sft"][1]
    bench.run("stages.sft.epochs=2", stages=["sft"])
    assert bench.run(stages=["sft"])["sft"] == ("reuse", first)
    registry = bench.workshop().registry
    assert registry.checkpoint("harbour/sft").id == first
    assert bench.run("name=port", stages=["sft"])["sft"] == ("reuse", first)
    assert registry.checkpoint("port/sft").id == first
    count = len(registry.all_checkpoints())
    bench.run("name=port", stages=["sft"])
    assert len(registry.all_checkpoints()) == count


def test_data_edited_while_stages_run_is_for_the_next_run(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    file = tmp_path / "talk.jsonl"

    class Edits(Progress):
        def bar(self, title: str, total: float):
            file.write_text(file.read_text().replace("Heron is a boat", "Heron is a goat"))
            return super().bar(title, total)

    bench.run(stages=["adapter"], progress=Edits())
    registry = bench.workshop().registry
    assert registry.checkpoint("harbour/sft").data == registry.checkpoint("harbour/adapter").data
    assert [stage.action for stage in plan(bench.workshop(), stages=["adapter"])] == ["run", "run"]


def test_a_late_stage_that_cannot_start_is_refused_before_the_first_trains(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    with pytest.raises(AlignError, match="max_length is 100000"):
        bench.run("stages.aligned.max_length=100000")
    assert bench.workshop().registry.all_runs() == []


def test_an_adapter_whose_base_was_edited_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    bench.run(stages=["adapter"])
    registry = bench.workshop().registry
    file = registry.checkpoint("harbour/sft").path / "config.json"
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(AlignError, match=r"harbour/sft .*config\.json"):
        bench.workshop("stages.aligned.from=harbour/adapter").starting_point("aligned", {})


def test_a_foreign_adapter_is_another_start_on_another_base(done: Bench, tmp_path: Path) -> None:
    made = {record.stage: record.path for record in done.workshop().registry.all_checkpoints()}
    shutil.copytree(made["sft"], tmp_path / "base")
    shutil.copytree(made["adapter"], tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    override = f"stages.aligned.from={tmp_path / 'adapter'}"
    before = done.workshop(override).starting_point("aligned", {})
    file = tmp_path / "base" / "config.json"
    file.chmod(0o644)
    file.write_text(file.read_text() + " ")
    after = done.workshop(override).starting_point("aligned", {})
    assert before is not None
    assert after is not None
    assert before.id != after.id


def test_questions_that_a_stage_trains_on_are_not_asked(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    bench.run("data.asked={path: talk.jsonl, test_fraction: 1.0}", "evaluation.prompts=asked", stages=["sft"])
    record = bench.workshop().registry.checkpoint("harbour/sft")
    trained = (bench.workshop().registry.data("harbour/talk").path / "train.jsonl").read_text()
    assert record.samples
    assert not [row for row in record.samples if row["prompt"] in trained]


def test_a_full_disk_while_a_stage_works_is_said_in_words(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    bench = bench_in(tmp_path, tiny_llama)
    monkeypatch.setattr("align.stages.sft.save_checkpoint", full)
    with pytest.raises(StageFailed, match="No space left on device"):
        bench.run(stages=["sft"])
    monkeypatch.undo()
    assert [stage.action for stage in plan(bench.workshop(), stages=["sft"])] == ["resume"]
    assert bench.run(stages=["sft"])["sft"][0] == "resume"
