"""Weights from a folder, exactly as they are there: no part made up, no file executed, no network asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.errors import AlignError
from align.models.finite import require_finite_weights
from align.models.folders import errors_of, quiet
from align.models.hardware import device
from align.models.quantized import mend_for_cpu, quantization_config
from align.models.source import Quantize, Source

CLASSES = {"model": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
NEW_HEAD = "score."  # the only weights that a checkpoint may lack: those of a head that is still to be trained


def open_weights(root: Source, *, reward: bool, dtype: torch.dtype, quantize: Quantize | None = None) -> Any:
    """A model in eval mode on this process's device; as a classifier with one label where `reward`.

    Raises AlignError when weights are missing, damaged, of another shape or not finite; a causal model opened as a classifier lacks
    its head by right, and gets one from the caller.
    """
    require_finite_weights(root)
    options: dict[str, Any] = {"num_labels": 1} if reward else {}
    if quantize:
        options |= {"quantization_config": quantization_config(quantize, dtype), "device_map": {"": device()}}
    with errors_of(root.path), quiet():
        model, report = CLASSES["reward" if reward else "model"].from_pretrained(
            root.path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
            trust_remote_code=root.trust_remote_code, **options,
        )  # fmt: skip
    allowed = NEW_HEAD if reward and root.kind == "model" else "\0"
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(allowed))
    if missing:
        raise AlignError(
            f"{root.path}: {len(missing)} weights of the architecture are not in the files (such as {missing[0]})",
            "The folder is incomplete or its config.json belongs to another model.",
        )
    if quantize:
        mend_for_cpu(model)
        return model.eval()
    return model.to(device()).eval()


def fresh_weights(config: Any, *, vocabulary: int, seed: int) -> Any:
    """A model of the config's shape with random weights by the seed, with room for `vocabulary` tokens."""
    config.vocab_size = max(config.vocab_size, vocabulary)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device())


def grow_vocabulary(model: Any, rows: int) -> None:
    """Makes room for `rows` tokens; new rows start as the mean of the old ones. Never shrinks."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    with quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for tensor in _tensors_by_token(embeddings):
            tensor[old:] = tensor[:old].float().mean(dim=0).to(tensor.dtype)


def silence_dropout(model: nn.Module) -> None:
    """Turns every dropout of the modules off. The config keeps its values, for they belong to the checkpoint."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _tensors_by_token(embeddings: list[Any]) -> Iterator[Tensor]:
    """Weights, and biases where there are any, that have a row for each token; tied ones once."""
    seen: set[int] = set()
    for module in embeddings:
        for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
