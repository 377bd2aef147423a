"""TRL 1.12.0's PPOTrainer, the last one that TRL shipped, on the same work as align. Prints one line, RESULT and JSON.

Runs in an environment of its own with trl==1.12.0; ppo_peer.py starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--prompts", required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--response", type=int, required=True)
parser.add_argument("--epochs", type=int, required=True)
parser.add_argument("--iterations", type=int, required=True)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()

import torch  # noqa: E402

torch.set_num_threads(args.threads)
import trl.experimental.ppo.ppo_trainer as ppo  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

rows = json.loads(Path(args.prompts).read_text())
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2))
reward, value = (
    AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32) for _ in range(2)
)
config = PPOConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
    total_episodes=args.batch * args.iterations, response_length=args.response, num_sample_generations=0, report_to=[],
    use_cpu=not torch.cuda.is_available(), save_strategy="no", gradient_checkpointing=False, bf16=args.bf16,
    num_ppo_epochs=args.epochs, local_rollout_forward_batch_size=64, disable_tqdm=True, kl_coef=0.05,
    learning_rate=1e-5, logging_steps=1,
)  # fmt: skip
spent = {"generate": 0.0}
generate = ppo.batch_generation


def timed(*rest, **named):
    start = time.process_time()
    found = generate(*rest, **named)
    spent["generate"] += time.process_time() - start
    return found


ppo.batch_generation = timed
log: list[dict[str, float]] = []
PPOTrainer.log = lambda _self, logs, *_rest: log.append(dict(logs))
trainer = PPOTrainer(
    args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
    train_dataset=Dataset.from_dict({"input_ids": rows}), eval_dataset=Dataset.from_dict({"input_ids": rows[:2]}),
)  # fmt: skip
began, processor = time.perf_counter(), time.process_time()
trainer.train()
sys.stdout.write(
    "RESULT "
    + json.dumps(
        {
            "seconds": (time.perf_counter() - began) / args.iterations,
            "processor_seconds": (time.process_time() - processor) / args.iterations,
            "generate_seconds": spent["generate"] / args.iterations,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "policy_loss": [entry["loss/policy_avg"] for entry in log],
            "value_loss": [entry["loss/value_avg"] for entry in log],
            "kl": [entry["objective/kl"] for entry in log],
        }
    )
    + "\n"
)
