"""TRL 1.16 (SFT, DPO, reward model) or plain transformers.Trainer on the work of a file. Prints one line, RESULT and JSON.

Runs in any environment with trl==1.16.0; bench.py starts it. Same rows in the same order as the other side, same optimiser,
learning rate and start. Beyond that TRL's defaults hold, but for what the options say.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers import logging as hf_logging
from work import LONGEST, StepClock, peak_mib, read_work, say


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True)
    parser.add_argument("--plain", action="store_true", help="transformers.Trainer instead of TRL")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--packed", action="store_true", help="rows packed to 1,024 tokens, one pack a step (sft)")
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probabilities once (dpo)")
    parser.add_argument("--steps", type=int, help="fewer timed steps than the work has")
    parser.add_argument("--own-precision", action="store_true", help="bfloat16 autocast, whatever the work says")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    hf_logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = read_work(options.work)
    work["steps"] = options.steps or work["steps"]
    with tempfile.TemporaryDirectory() as folder:
        say(run(work, options, folder))


def run(work: dict[str, Any], options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Result of all steps. reference_seconds: what `--precompute` took."""
    steps = work["warmup"] + work["steps"]
    arguments: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 1 if options.packed else work["batch"],
        "learning_rate": work["learning_rate"], "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential", "bf16": options.own_precision or work["precision"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if options.no_checkpointing:
        arguments["gradient_checkpointing"] = False
    trainer = _trainer(work, arguments, options)
    clock = watch(trainer, work["warmup"])
    trainer.train()
    result = clock.result() | {"peak_mib": peak_mib()}
    if options.precompute:
        result["reference_seconds"] = trainer.reference_seconds
    assert len(clock.losses) == steps
    return result


def _trainer(work: dict[str, Any], arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    if options.plain:
        return _plain_trainer(work, arguments)
    if work["kind"] == "sft":
        return _sft_trainer(work, arguments, packed=options.packed)
    if work["kind"] == "dpo":
        return _dpo_trainer(work, arguments, precompute=options.precompute)
    return _reward_trainer(work, arguments)


def watch(trainer: Any, warmup: int) -> StepClock:
    """A clock on the steps of a trainer."""
    clock, step = StepClock(warmup), trainer.training_step

    def timed_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        clock.step_begins(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        loss = step(model, inputs, *rest, **named)
        clock.losses.append(float(loss))
        return loss

    class End(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.training_ends()

    trainer.training_step = timed_step
    trainer.add_callback(End())
    return clock


def _model(work: dict[str, Any]) -> Any:
    """The folder, or the base with the adapter that both sides start from."""
    if not work["adapter"]:
        return work["start"]
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    more: dict[str, Any] = {}
    if work["quantize"]:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, work["precision"]),
        )  # fmt: skip
        more = {"quantization_config": config, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32, **more)
    return PeftModel.from_pretrained(base, work["start"], is_trainable=True)


def _sft_trainer(work: dict[str, Any], arguments: dict[str, Any], *, packed: bool) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        _model(work), args=SFTConfig(packing=packed, max_length=LONGEST, **arguments),
        train_dataset=Dataset.from_dict({"input_ids": work["rows"]}),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
    )  # fmt: skip


def _dpo_trainer(work: dict[str, Any], arguments: dict[str, Any], *, precompute: bool) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):  # type: ignore[misc]
        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the rows are token ids already

        def _precompute_ref_logps(self, *rest: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*rest, **named)
            Timed.reference_seconds += time.perf_counter() - began
            return found

    config = DPOConfig(
        precompute_ref_log_probs=precompute, beta=work["beta"], max_length=LONGEST, **arguments
    )  # fmt: skip
    return Timed(
        _model(work), args=config, train_dataset=Dataset.from_list(work["rows"]),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
    )  # fmt: skip


def _reward_trainer(work: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")}
            for row in work["rows"]]  # fmt: skip
    return RewardTrainer(
        _model(work), args=RewardConfig(max_length=LONGEST, **arguments), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
    )  # fmt: skip


def _plain_trainer(work: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from datasets import Dataset

    def padded(batch: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [torch.tensor(row["input_ids"]) for row in batch]
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, -100)
        )
        return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}

    return Trainer(
        AutoModelForCausalLM.from_pretrained(work["start"], dtype=torch.float32), args=TrainingArguments(**arguments),
        data_collator=padded, train_dataset=Dataset.from_dict({"input_ids": work["rows"]}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
