"""One PPO iteration of align beside one of TRL 1.12.0, the last TRL with PPO: seconds, processor seconds, peak memory.

    python -m venv build/trl112 && build/trl112/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 datasets
    python benchmarks/ppo_peer.py --peer build/trl112/bin/python --out build/ppo-speed.md

Same Llama with random weights, same prompts, batch, response length, epochs and arithmetic; both with the allocator told
to keep its memory. The sides take turns in processes of their own, and the medians are compared. Peak memory is that of
the process, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.work import SHAPES, model_folder, prompt_rows

ROOT = Path(__file__).parents[1]
PEER = "TRL 1.12.0"
WAYS: dict[str, dict[str, Any]] = {
    "four models": {"value": "model"},
    "value head on the policy's trunk": {"value": "trunk"},
    "adapters on one base": {"adapter": {"rank": 16}, "value": "adapter"},
}
INTRODUCTION = [
    "# PPO beside TRL 1.12.0",
    "",
    "TRL 1.12.0 is the last one with PPO. Same Llama shape with random weights, same prompts, batch, response length, epochs and",
    "arithmetic, processes of their own in turn, the allocator of both told to keep its memory. Seconds are of the processor; peak",
    "memory is that of the process, libraries included. Made by `python benchmarks/ppo_peer.py --out FILE`. The",
    "losses agree in kind and not in value: the responses are drawn by different generators, and TRL's value model starts from a",
    "random head where ours starts from 0.",
    "",
]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}


def main() -> None:
    """The command line: starts both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="python of an environment with trl==1.12.0")
    parser.add_argument("--shape", default="15m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--response", type=int, default=53)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on both sides")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        sys.stdout.write("RESULT " + json.dumps(run_ours(options)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        rows = prompt_rows(options.batch * options.iterations, SHAPES[options.shape]["vocab_size"])
        prompts.write_text(json.dumps(rows))
        options.prompts = str(prompts)
        text = page(options, compare(options, model_folder(options.shape)))
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def compare(options: argparse.Namespace, model: str) -> dict[str, list[dict[str, Any]]]:
    """Results of every side, turn by turn."""
    named = ("prompts", "batch", "response", "epochs", "iterations", "threads")
    work = [part for name in named for part in (f"--{name}", str(getattr(options, name)))]
    work += ["--bf16"] if options.bf16 else []
    sides: dict[str, list[str]] = {}
    if options.peer:
        sides[PEER] = [str(options.peer), str(ROOT / "benchmarks/peers/trl_ppo.py"), "--model", model, *work]
    for way in options.ways:
        sides[f"align, {way}"] = [sys.executable, __file__, "--ours", way, "--shape", options.shape, *work]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(options.threads)}
    for _ in range(options.turns):
        for side, command in sides.items():
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            found[side].append(json.loads(line.removeprefix("RESULT ")))
            sys.stderr.write(f"{side}: {found[side][-1]['processor_seconds']:.2f} s\n")
    return found


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """The iterations of one way in this process: rounds collected and learnt by the product's own loop."""
    import torch

    torch.set_num_threads(options.threads)
    from align.advantages import KlController, RunningMoments
    from align.chat.templates import prepare_tokenizer
    from align.data.examples import Message, Prompt
    from align.memory import Budget
    from align.models.folders import load_tokenizer
    from align.models.loading import load_reward
    from align.models.roles import RoleOpener
    from align.models.source import source_of
    from align.ppo.collection import Collector, Controls
    from align.ppo.encoding import EncodedPrompt
    from align.ppo.objective import PpoLoss
    from align.ppo.prompts import RoundStream
    from align.ppo.proof import Proof
    from align.recipe.settings import PpoSettings
    from align.rewards.model import RewardModel, context_encoder
    from align.rewards.total import build_rewards
    from align.rollout.engine import LocalEngine
    from align.trainer import Task, train

    precision = "bfloat16" if options.bf16 else "float32"
    settings = PpoSettings.model_validate({
        "kind": "ppo", "prompts": "x", "reward": "reward", "rollouts": options.batch, "batch_size": options.batch,
        "round_epochs": options.epochs, "rounds": options.iterations, "max_new_tokens": options.response,
        "precision": precision, "learning_rate": 1e-5, "schedule": "linear", "warmup": 0.0, "log_steps": options.epochs,
        "missing_stop_penalty": 0.0, **WAYS[options.ours],
    })  # fmt: skip
    source = source_of(model_folder(options.shape))
    tokenizer = load_tokenizer(source)
    heard = _listener()
    with tempfile.TemporaryDirectory() as work:
        roles = RoleOpener(settings, source, None, tokenizer, 0, Path(work)).open()
        scorer = load_tokenizer(source)
        prepare_tokenizer(scorer, None)
        classifier = (
            load_reward(source, trainable=True, tokenizer=scorer, precision=precision).eval().requires_grad_(False)
        )
        model = RewardModel(classifier, context_encoder(classifier, scorer))
        prompts = [
            EncodedPrompt(Prompt((Message("user", tokenizer.decode(ids)),)), ids)
            for ids in json.loads(Path(options.prompts).read_text())
        ]
        controls = Controls(KlController(settings.kl_coefficient, None, 10_000), RunningMoments())
        rewards, none = (build_rewards(terms, models={"reward": model}, judges={}) for terms in (settings.reward, []))
        engine = LocalEngine(tokenizer, [tokenizer.eos_token_id])
        collector = Collector(settings, prompts, engine, rewards, none, controls, Budget.of(settings), 0, heard)
        stream = RoundStream(options.iterations, settings, 0)
        objective = PpoLoss(settings, collector, stream.steps_per_round, lambda *_: {}, Proof(not options.bf16), heard)
        tickets = range(options.iterations * settings.rollouts)
        task = Task(
            roles, objective, tickets, [], settings, 0, Path(work) / "state", (), stream,
            dict.fromkeys(roles.value_names, settings.value_learning_rate()),
        )  # fmt: skip
        began, processor = time.perf_counter(), time.process_time()
        train(task, heard)
        seconds, used = time.perf_counter() - began, time.process_time() - processor
    return {
        "seconds": seconds / options.iterations,
        "processor_seconds": used / options.iterations,
        "generate_seconds": heard.spent["generate"] / options.iterations,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "policy_loss": heard.series("train.policy_loss"),
        "value_loss": heard.series("train.value_loss"),
        "kl": heard.series("round.kl"),
    }


def _listener() -> Any:
    """Keeps what is logged, and the processor time of every bar by its title."""
    from contextlib import contextmanager

    from align.progress import Progress

    class Listener(Progress):
        def __init__(self) -> None:
            self.log: list[dict[str, float]] = []
            self.spent: dict[str, float] = {}

        def metrics(self, step: int, values: Any) -> None:
            self.log.append(dict(values))

        def series(self, name: str) -> list[float]:
            return [values[name] for values in self.log if name in values]

        @contextmanager
        def bar(self, title: str, total: float) -> Any:
            began = time.process_time()
            with Progress().bar(title, total) as bar:
                yield bar
            self.spent[title] = self.spent.get(title, 0.0) + time.process_time() - began

    return Listener()


def page(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """The table as Markdown."""
    peer = found.get(PEER)
    lines = [
        *INTRODUCTION,
        f"PPO, {options.shape}, {options.batch} prompts, {options.response} new tokens, {options.epochs} epochs, "
        f"{'bfloat16' if options.bf16 else 'float32'}, {options.threads} thread(s); medians of {options.turns} turns of "
        f"{options.iterations} iterations ({platform.processor() or platform.machine()}).",
        "",
        "| | seconds an iteration | of them generating | x TRL | range of x | peak MiB | of TRL's | policy loss, value loss (first iteration) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, results in found.items():
        seconds, peak = _median(results, "processor_seconds"), _median(results, "peak_mib")
        cells = [f"{seconds:.2f}", f"{_median(results, 'generate_seconds'):.2f}"]
        if peer:
            ratios = [a["processor_seconds"] / b["processor_seconds"] for a, b in zip(peer, results, strict=True)]
            cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
            cells += [f"{peak:,.0f}", f"{peak / _median(peer, 'peak_mib'):.2f}"]
        else:
            cells += ["", "", f"{peak:,.0f}", ""]
        cells.append(f"{results[0]['policy_loss'][0]:.4f}, {results[0]['value_loss'][0]:.4f}")
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _median(results: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(result[name] for result in results)


if __name__ == "__main__":
    main()
