"""What a folder is, told without torch; and every folder that is refused, with the reason in the message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import AlignError
from align.models.source import ADAPTER_RECORD, located, source_of, weights_sha256


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """A folder that looks like an adapter; its weights are never read here."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # a header that names no tensor
    write(folder / "adapter_config.json", peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(model))
    return folder


def write(file: Path, **values: object) -> None:
    """A JSON file whose old values are kept."""
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**old, **values}))


def refused(path: Path | str, **keywords: bool) -> str:
    with pytest.raises(AlignError) as caught:
        source_of(path, **keywords)
    return str(caught.value)


def test_a_plain_folder_is_a_model(model: Path) -> None:
    source = source_of(model)
    assert (source.kind, source.path, source.base) == ("model", str(model), None)
    assert located(source) is source


def test_a_classifier_with_one_label_is_a_reward_model(model: Path) -> None:
    write(model / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    assert source_of(model).kind == "reward"


def test_a_classifier_with_more_labels_is_refused(model: Path) -> None:
    write(model / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "2 labels" in refused(model)


@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", "adapter"), ("SEQ_CLS", "adapter-reward")])
def test_an_adapter_knows_its_base_and_how_that_was_quantized(adapter: Path, model: Path, task: str, kind: str) -> None:
    write(adapter / "adapter_config.json", task_type=task)
    write(adapter / ADAPTER_RECORD, quantize="nf4", base_sha256="ab", dtype="float32")
    source = source_of(adapter)
    assert (source.kind, source.quantize, source.base_sha256) == (kind, "nf4", "ab")
    assert source.base == source_of(model)
    assert source.root.path == str(model)


def test_a_moved_pair_of_adapter_and_base_is_found_again(adapter: Path, model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(model, elsewhere / "model")
    shutil.move(adapter, elsewhere / "adapter")
    assert source_of(elsewhere / "adapter").root.path == str(elsewhere / "model")


def test_an_adapter_without_its_base_names_the_recorded_one(adapter: Path, model: Path) -> None:
    shutil.rmtree(model)
    assert str(model) in refused(adapter)


def test_a_base_on_the_hub_passes_through_with_its_revision(adapter: Path) -> None:
    write(adapter / "adapter_config.json", base_model_name_or_path="some-org/some-model", revision="abc")
    base = source_of(adapter).root
    assert (base.path, base.revision) == ("some-org/some-model", "abc")


@pytest.mark.parametrize("kind", ["IA3", "PROMPT_TUNING"])
def test_other_adapters_than_lora_are_refused(adapter: Path, kind: str) -> None:
    write(adapter / "adapter_config.json", peft_type=kind)
    assert kind in refused(adapter)


def test_an_adapter_on_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    upper = Path(shutil.copytree(adapter, tmp_path / "upper"))
    write(upper / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "Merge that one first" in refused(upper)


def test_a_folder_without_weights_is_refused_unless_only_its_config_is_wanted(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no weights" in refused(model)
    assert source_of(model, needs_weights=False).kind == "model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    message = refused(model)
    assert name in message
    assert "save_pretrained" in message


def test_a_missing_shard_is_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(model)
    assert "model-2.safetensors" in message
    assert "model-1.safetensors" not in message


def test_weights_under_a_name_of_their_own_are_refused(model: Path) -> None:
    write(model / "config.json", transformers_weights="other.safetensors")
    assert "other.safetensors" in refused(model)
    write(model / "config.json", transformers_weights="model.safetensors")
    assert source_of(model).kind == "model"


def test_weights_that_are_quantized_already_are_refused(model: Path) -> None:
    write(model / "config.json", quantization_config={"quant_method": "gptq"})
    assert "gptq" in refused(model)


def test_code_that_comes_with_a_model_needs_consent(model: Path) -> None:
    write(model / "config.json", model_type="novel", auto_map={"AutoConfig": "novel.NovelConfig"})
    assert "trust_remote_code: true" in refused(model)
    assert source_of(model, trust_remote_code=True).trust_remote_code
    write(model / "config.json", model_type="llama")
    assert source_of(model).kind == "model", "transformers knows llama itself, so no foreign code runs"


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config_is_refused_by_name(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert "config.json" in refused(model)


def test_a_misspelt_folder_is_refused_with_its_neighbour_and_without_a_network(model: Path) -> None:
    assert "Did you mean 'model'?" in refused(model.parent / "modle")
    assert "org/name" in refused("nope")
    assert "no such folder" in refused("./some-org/some-model")
    assert "not a model folder" in refused(model / "config.json")
    assert "neither config.json" in refused(model.parent)


def test_a_hub_id_passes_through_and_is_refused_only_when_it_is_needed() -> None:
    source = source_of("some-org/some-model", revision="v1")
    assert (source.kind, source.path, source.revision) == ("model", "some-org/some-model", "v1")
    with pytest.raises(AlignError, match="some-org/some-model"):
        located(source)


def test_one_changed_byte_changes_the_identity_of_weights(model: Path) -> None:
    before = weights_sha256(source_of(model))
    assert weights_sha256(source_of(model)) == before
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert weights_sha256(source_of(model)) != before


def test_telling_what_a_folder_is_loads_no_torch(model: Path) -> None:
    program = f"import sys; from align.models.source import source_of; source_of({str(model)!r}); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
