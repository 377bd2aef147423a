"""Speaks the part of vLLM's interface that `align.rollout.vllm` uses, on a small transformers model.

Where vLLM keeps state, so does this: weights stay as they were loaded until workers are told to load others, an adapter
is read once for each id, and keys and values of the old weights are used until the prefix cache is reset. Unknown
arguments are refused, as vLLM refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool
    seed: int


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


@dataclass
class LLM:
    """One model in memory. `made` lists every instance."""

    model: str
    dtype: str
    max_model_len: int
    gpu_memory_utilization: float
    skip_tokenizer_init: bool
    generation_config: str
    logprobs_mode: str
    revision: str | None = None
    quantization: str | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    noise: float = field(default=0.0, init=False)  # deviation of what is added to its logits
    adapters: dict[int, Any] = field(default_factory=dict, init=False)

    made = []  # noqa: RUF012

    def __post_init__(self) -> None:
        assert self.logprobs_mode in ("raw_logprobs", "processed_logprobs")
        assert self.max_lora_rank in (8, 16, 32, 64, 128, 256, 320, 512)
        assert 0 < self.gpu_memory_utilization <= 1
        self.weights = _load(self.model)
        self.cached_keys_are_stale = False
        LLM.made.append(self)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        self.weights = _load(kwargs["weights_path"])
        self.cached_keys_are_stale = True
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.cached_keys_are_stale = False
        return True

    def generate(
        self, prompts: list[dict[str, Any]], params: list[SamplingParams], *, lora_request: Any, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not self.cached_keys_are_stale, "keys and values of the old weights"
        assert len(prompts) == len(params)
        assert use_tqdm is False
        model = self.weights if lora_request is None else self._adapted(lora_request)
        return [
            RequestOutput([self._complete(model, prompt["prompt_token_ids"], wanted)])
            for prompt, wanted in zip(prompts, params, strict=True)
        ]

    def _adapted(self, request: LoRARequest) -> Any:
        from peft import PeftModel

        assert self.enable_lora
        if request.lora_int_id not in self.adapters:
            self.adapters = {
                request.lora_int_id: PeftModel.from_pretrained(_load(self.model), request.lora_path).eval()
            }
        adapted = self.adapters[request.lora_int_id]
        assert adapted.peft_config["default"].r <= self.max_lora_rank
        return adapted

    def _complete(self, model: Any, prompt: list[int], wanted: SamplingParams) -> CompletionOutput:
        assert (wanted.n, wanted.logprobs, wanted.ignore_eos, wanted.detokenize) == (1, 0, True, False)
        assert len(prompt) + wanted.max_tokens <= self.max_model_len
        draw = torch.Generator().manual_seed(wanted.seed)
        ids: list[int] = []
        logprobs = []
        while len(ids) < wanted.max_tokens and not (ids and ids[-1] in wanted.stop_token_ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, -1].float()
            logits = logits + self.noise * torch.randn(logits.shape, generator=draw)
            raw = logits.log_softmax(-1)
            processed = _cut(logits / (wanted.temperature or 1), wanted.top_k, wanted.top_p).log_softmax(-1)
            token = int(
                processed.argmax() if not wanted.temperature else processed.exp().multinomial(1, generator=draw)
            )
            shown = raw if self.logprobs_mode == "raw_logprobs" else processed
            ids.append(token)
            logprobs.append({token: Logprob(float(shown[token]))})
        return CompletionOutput(ids, logprobs, "stop" if ids[-1] in wanted.stop_token_ids else "length")


def modules() -> dict[str, ModuleType]:
    """What to put into sys.modules."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    return {"vllm": package, "vllm.lora": lora, "vllm.lora.request": request}


def _load(folder: str) -> Any:
    assert Path(folder, "config.json").is_file(), f"{folder} is no model folder"
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _cut(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    out = (before >= top_p) | (torch.arange(len(logits)) >= (top_k or len(logits)))
    return logits.index_fill(0, order[out], -torch.inf)
