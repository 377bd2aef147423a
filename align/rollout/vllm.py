"""vLLM as the generator of a stage: it has weights of its own, which `sync` replaces each round.

An adapter is written as a PEFT folder and asked for under a new id, on the base that its record names. A full model is
written as a folder, which the running workers load. Nothing here imports vllm before an engine is made.

Tested against a stand-in that speaks the same interface, not against vLLM itself. Written for vllm 0.18 and newer, where
`reload_weights` takes a path.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from align.errors import AlignError
from align.models.adapters import AdapterRecord, is_adapted
from align.models.saving import save_checkpoint
from align.progress import Progress
from align.rollout.generation import Reply, Sampling, reply_limits, reply_of
from align.rollout.rows import Row

MEMORY_SHARE = 0.35  # of the GPU is vLLM's; the rest is for training beside it
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has kernels for
BEYOND_LORA = ("use_dora", "modules_to_save", "trainable_token_indices")  # of an adapter, which vLLM does not apply


class VllmEngine:
    """Generates with vLLM. `folder` is its own: weights of the current round stand there.

    temperature: the one that will be sampled at. Log-probabilities come from before any cut, as elsewhere, at
    temperature 1; at others vLLM has only those after the cut, so top_k and top_p are refused there.
    max_tokens: of the longest prompt and its reply. dtype: 'bfloat16' or 'float32'.
    Raises AlignError where vllm is not installed.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Sequence[int], folder: Path, *, temperature: float, max_tokens: int, dtype: str
    ) -> None:
        self.vllm = _installed("vllm")
        self.tokenizer = tokenizer
        self.stop_ids = list(stop_ids)
        self.folder = folder
        self.temperature = temperature
        self.settings: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": max_tokens,
            "gpu_memory_utilization": MEMORY_SHARE,
            "skip_tokenizer_init": True,  # prompts and replies are token ids
            "generation_config": "vllm",  # not the defaults (penalties, say) that came with the model
            "logprobs_mode": "raw_logprobs" if temperature == 1 else "processed_logprobs",
        }
        self.llm: Any = None
        self.adapter: Any = None  # LoRARequest of the current round
        self.version = 0

    def sync(self, model: nn.Module) -> None:
        """Give vLLM the weights of the model as they are now. Raises AlignError for an adapter that it cannot apply."""
        self.version += 1
        folder = self.folder / f"weights-{self.version}"
        save_checkpoint(model, self.tokenizer, folder)
        if is_adapted(model):
            self._use_adapter(model, folder)
        elif self.llm is None:
            self.llm = self.vllm.LLM(model=str(folder), **self.settings)
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self.llm.reset_prefix_cache()  # its keys and values are those of the old weights
        shutil.rmtree(self.folder / f"weights-{self.version - 1}", ignore_errors=True)

    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], sampling: Sampling, progress: Progress | None = None
    ) -> list[Reply]:
        """One reply for each prompt, in their order; logps are vLLM's. Raises AlignError for what it cannot do exactly."""
        self._check(sampling)
        limits = reply_limits(model, prompts, sampling.max_new_tokens)
        if self.llm is None:
            self.sync(model)
        rows = [Row(index, prompt, limit) for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]
        with (progress or Progress()).bar("generate", len(rows)) as bar:
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [self._parameters(row, sampling) for row in rows],
                lora_request=self.adapter,
                use_tqdm=False,
            )
            for row, output in zip(rows, outputs, strict=True):
                self._take(row, output.outputs[0])
            bar.advance(len(rows), tokens=sum(len(row.ids) for row in rows))
        return [reply_of(self.tokenizer, row, self.stop_ids, ()) for row in rows]

    def _take(self, row: Row, completion: Any) -> None:
        row.ids = list(completion.token_ids)
        row.logps = [float(step[token].logprob) for token, step in zip(row.ids, completion.logprobs, strict=True)]
        row.finished = row.ids[-1] in self.stop_ids

    def _parameters(self, row: Row, sampling: Sampling) -> Any:
        return self.vllm.SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=row.limit,
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # the stop ids are all that ends a reply
            logprobs=0,  # of the chosen token alone
            detokenize=False,
            seed=int(np.random.SeedSequence((sampling.seed, row.index)).generate_state(1)[0]),
        )

    def _use_adapter(self, model: Any, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        beyond = [key for key in BEYOND_LORA if config.get(key)]
        if beyond or config["r"] > RANKS[-1]:
            what = f"has {beyond[0]}" if beyond else f"is of rank {config['r']}"
            raise AlignError(f"the adapter {what}, which vLLM cannot apply", "Set `engine: local`.")
        if self.llm is None:
            record: AdapterRecord = model.adapter_record
            rank = next(rank for rank in RANKS if rank >= config["r"])
            quantization = "bitsandbytes" if record.quantize else None
            self.llm = self.vllm.LLM(
                model=record.base, revision=record.revision, quantization=quantization,
                enable_lora=True, max_loras=1, max_lora_rank=rank, **self.settings,
            )  # fmt: skip
        request = _installed("vllm.lora.request").LoRARequest
        self.adapter = request(f"policy-{self.version}", self.version, str(folder))  # vLLM keeps adapters by their id

    def _check(self, sampling: Sampling) -> None:
        if sampling.beams > 1 or sampling.stop:
            raise AlignError("engine vllm has neither beams nor stop strings here", "Set `engine: local`.")
        if sampling.temperature not in (0, self.temperature):
            raise AlignError(
                f"engine vllm was made for temperature {self.temperature}, not {sampling.temperature}",
                "Its log-probabilities would be of another distribution.",
            )
        if sampling.temperature != 1 and (sampling.top_k or sampling.top_p < 1):
            raise AlignError(
                f"engine vllm has no log-probabilities from before top_k and top_p at temperature {sampling.temperature}",
                "Set temperature: 1, or drop top_k and top_p, or set `engine: local`.",
            )


def _installed(name: str) -> ModuleType:
    """The module, imported now. Raises AlignError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AlignError(
            f"engine: vllm needs the package vllm, which cannot be imported here ({error})",
            "Install it (pip install 'vllm>=0.18', Linux with a GPU), or set `engine: local`.",
        ) from error
