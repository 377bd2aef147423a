"""LoRA adapters on a frozen base: made, opened, checked, saved, merged. The only importer of peft.

An adapter folder is plain PEFT. Beside its files stands a record of the base that it was trained on, because peft itself
would put it on any base of the same shape, quantized or not. The base has the name that it has on the hub, the path that it
has outside the registry, or `../ID` where both are checkpoints of one registry.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align.errors import AlignError, did_you_mean
from align.models.finite import require_finite_weights
from align.models.source import ADAPTER_RECORD, Quantize, Source, weights_sha256
from align.recipe.training_settings import AdapterSettings
from align.registry.registration import FOLDERS

NAME = "default"  # peft's own name for the one adapter of a model
OFF = ""  # for `using`: the base alone


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter's folder must remember of its base. pissa_start: the tensors that PiSSA took out of the base."""

    base: str
    revision: str | None
    base_sha256: str
    quantize: Quantize | None
    dtype: str
    pissa_start: dict[str, Tensor] = field(default_factory=dict)


def record_of(base: Source, quantize: Quantize | None, dtype: torch.dtype) -> AdapterRecord:
    """The record of an adapter on a located base."""
    return AdapterRecord(
        base.hub_id or base.path,
        base.revision if base.hub_id else None,
        weights_sha256(base),
        quantize,
        str(dtype).removeprefix("torch."),
    )


def add_adapter(model: Any, settings: AdapterSettings, record: AdapterRecord, *, added: list[int], seed: int) -> Any:
    """Puts a new adapter on a frozen model; the rows of the `added` token ids train with it, in and out.

    Raises AlignError for targets that the model does not have, and for what cannot be combined.
    """
    _refuse_contradictions(settings, record)
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # 8 and 8.0 are one adapter, in its files too
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.target),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=True if settings.init == "default" else settings.init,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **_trained_whole(model, added),
    )
    with torch.random.fork_rng(), _without_warnings():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    if settings.init == "pissa":
        record.pissa_start.update({name: tensor.clone() for name, tensor in _lora_tensors(adapted).items()})
    adapted.adapter_record = record
    return adapted


def open_adapter(model: Any, source: Source, record: AdapterRecord, *, trainable: bool) -> Any:
    """Puts a saved adapter on its base.

    Raises AlignError when the base is another than the recorded one, when keys of the adapter fit nothing in it, or when
    its weights are not finite.
    """
    if source.base_sha256 is not None and source.base_sha256 != record.base_sha256:
        raise AlignError(
            f"{source.path}: this adapter was trained on other weights than {record.base} holds now "
            f"(sha256 {source.base_sha256[:12]}, found {record.base_sha256[:12]})",
            "Restore the base that it was trained on.",
        )
    require_finite_weights(source)
    try:
        with _without_warnings():
            adapted = PeftModel.from_pretrained(model, source.path, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise AlignError(
            f"{source.path}: this adapter does not fit its base {record.base} ({str(error).splitlines()[0]})",
            "Its base must be the model that it was trained on.",
        ) from error
    _require_all_keys(adapted, source.path)
    adapted.adapter_record = record
    return adapted


def save_adapter(model: Any, folder: Path) -> None:
    """Writes a PEFT folder that fits the original base (PiSSA included) and the record of that base beside it."""
    record: AdapterRecord = model.adapter_record
    config = copy.deepcopy(model.peft_config[NAME])
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    if record.pissa_start:
        tensors = _as_plain_lora(tensors, record.pissa_start)
        config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    config.inference_mode, config.init_lora_weights = True, True
    config.base_model_name_or_path, config.revision = _named_base(record.base, folder), record.revision
    config.target_modules = sorted(config.target_modules)  # peft keeps a set: its order would change the folder's hash
    config.modules_to_save = sorted(config.modules_to_save or []) or None
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = {"base_sha256": record.base_sha256, "quantize": record.quantize, "dtype": record.dtype}
    (folder / ADAPTER_RECORD).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def _named_base(base: str, folder: Path) -> str:
    """A base as the adapter's own folder names it. One that lies among the checkpoints of the home where the adapter is made
    is named as seen from there, so that the same work gives the same bytes in every home."""
    place = Path(base)
    is_checkpoint = place.is_absolute() and place.parent.name == FOLDERS["checkpoints"]
    if is_checkpoint and folder.resolve().is_relative_to(place.parent.parent / "runs"):
        return f"../{place.name}"
    return base


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter sits on the model."""
    return isinstance(model, PeftModel)


def is_classifier(model: nn.Module) -> bool:
    """Whether it is one of transformers' sequence classifiers."""
    return type(model).__name__.endswith("ForSequenceClassification")


def merged(adapted: Any) -> Any:
    """The base with the adapter added into its weights. Raises AlignError when that gives numbers that are not finite."""
    try:
        with _without_warnings():
            return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AlignError(
            f"this adapter cannot be merged: {error}", "Train it again from its last good state."
        ) from error


def _refuse_contradictions(settings: AdapterSettings, record: AdapterRecord) -> None:
    if settings.init == "pissa" and (record.quantize or settings.dora):
        other = f"quantize: {record.quantize}" if record.quantize else "dora: true"
        raise AlignError(
            f"adapter.init: pissa cannot be combined with {other}: it changes the frozen weights that the other rests on",
            "Use init: default.",
        )


def _targets(model: Any, target: str | list[str]) -> str | list[str]:
    """Module name endings that peft shall look for. Heads never match: losses may read their weights directly."""
    if target == "all-linear":
        return target
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in heads
    ]  # fmt: skip
    endings = [target] if isinstance(target, str) else target
    for ending in endings:
        if not any(name == ending or name.endswith(f".{ending}") for name in linear):
            known = {name.rsplit(".", 1)[-1] for name in linear}
            raise AlignError(
                f"adapter.target: no linear module of this model ends with '{ending}'", did_you_mean(ending, known)
            )
    return endings


def _trained_whole(model: Any, added: list[int]) -> dict[str, Any]:
    """Settings of what trains besides the low-rank update: a reward model's head, and the rows of added tokens."""
    whole: dict[str, Any] = {"modules_to_save": ["score"] if is_classifier(model) else None}
    if not added:
        return whole
    names = {id(module): name for name, module in model.named_modules()}
    embeddings = [names[id(model.get_input_embeddings())]]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        embeddings.append(names[id(head)])
    if getattr(head, "bias", None) is not None:  # peft's training of single rows computes the head without its bias
        raise AlignError(
            f"the chat template adds {len(added)} tokens, and an adapter cannot train their rows in a head with a bias",
            "Train all weights (without `adapter:`), or give a `template:` of tokens that the model has.",
        )
    return {**whole, "trainable_token_indices": dict.fromkeys(embeddings, added)}


def _require_all_keys(adapted: Any, path: str) -> None:
    """peft only warns when keys of a file fit nothing, and leaves those parts of the adapter as they were born."""
    expected = set(get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False))
    saved = set(load_peft_weights(path, device="cpu"))
    foreign = saved - expected - set(adapted.state_dict())
    if foreign or expected - saved:
        example = sorted(foreign or expected - saved)[0]
        raise AlignError(
            f"{path}: {len(foreign)} of its {len(saved)} weights fit nothing in the base, and {len(expected - saved)} "
            f"are missing (such as {example})",
            "The adapter belongs to another model, or its file was changed.",
        )


def _lora_tensors(adapted: Any) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in tensors.items() if ".lora_" in name}


def _as_plain_lora(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA's B A on the base less B0 A0 is, on the whole base, the update [B, -B0] [A; A0] of twice the rank."""
    plain = dict(tensors)
    for name, first in start.items():
        now = tensors[name]
        is_out = ".lora_B." in name
        plain[name] = torch.cat([now, -first] if is_out else [now, first], dim=1 if is_out else 0)
    return plain


@contextmanager
def _without_warnings() -> Iterator[None]:
    """For calls whose warnings are errors of ours already, or of no concern to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Keeps what trains in float32: a bfloat16 weight loses updates below half its last digit."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def using(adapted: Any, name: str) -> Iterator[None]:
    """In this block forward passes go through the adapter `name`, through none where it is OFF; then as before.

    Only the way of the forward pass changes. What requires a gradient stays as it is, so that several adapters can train
    in one optimiser step: peft's own switch freezes all but the active one.
    """
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name or NAME], name == OFF
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def copy_adapter(adapted: Any, name: str, *, trainable: bool) -> None:
    """Adds a copy of the model's one adapter, as it is now, under another name; the first stays the active one."""
    config = copy.deepcopy(adapted.peft_config[NAME])
    config.init_lora_weights = True  # it is overwritten; PiSSA would take the base's weights apart once more
    tensors = get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
    _put(adapted, name, config, {key: tensor.detach().clone() for key, tensor in tensors.items()}, trainable=trainable)


def put_reward_adapter(adapted: Any, name: str, source: Source, *, trainable: bool) -> Tensor:
    """Adds a reward model's adapter to a policy on the same base, under a name; returns its score head, (1, H) float32."""
    config = LoraConfig.from_pretrained(source.path)
    config.task_type, config.modules_to_save = adapted.peft_config[NAME].task_type, None
    tensors = load_peft_weights(source.path, device="cpu")
    heads = [key for key in tensors if key.rpartition(".")[0].endswith("score")]
    head: Tensor = tensors[heads[0]].float()
    rest = {key: tensor for key, tensor in tensors.items() if key not in heads}
    _put(adapted, name, config, rest, trainable=trainable)
    return head


def fits_policy(source: Source, adapted: Any) -> bool:
    """Whether a reward model is an adapter on the very base that a policy's adapter rests on, in the same bits."""
    if source.kind != "adapter-reward" or not is_adapted(adapted):
        return False
    record: AdapterRecord = adapted.adapter_record
    if record.pissa_start or LoraConfig.from_pretrained(source.path).trainable_token_indices:
        return False
    return (source.base_sha256, source.quantize, source.dtype) == (record.base_sha256, record.quantize, record.dtype)


def _put(adapted: Any, name: str, config: LoraConfig, tensors: dict[str, Tensor], *, trainable: bool) -> None:
    config.inference_mode = not trainable
    with _without_warnings():
        adapted.add_adapter(name, config)
        report = set_peft_model_state_dict(adapted, tensors, adapter_name=name)
    if report.unexpected_keys:
        raise AlignError(
            f"{len(report.unexpected_keys)} weights of the adapter '{name}' fit nothing in the policy's base "
            f"(such as {report.unexpected_keys[0]})",
            "Train the reward model from the same checkpoint as the policy.",
        )
    adapted.set_requires_grad(name, trainable)
    place = next(adapted.parameters()).device
    for key, parameter in adapted.named_parameters():
        if f".{name}." in key or key.endswith(f".{name}"):
            parameter.data = parameter.data.to(place, torch.float32)
