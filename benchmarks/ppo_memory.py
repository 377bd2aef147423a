"""How much memory do four roles on one base take, beside supervised fine-tuning of the same adapter?

    python benchmarks/ppo_memory.py --shapes 15m 135m --out docs/ppo-memory.md

Policy, reference, value model and reward model are adapters on one frozen base; sft trains the policy's adapter alone. Same
rows, same tokens at once, same precision, each in a process of its own. Peak memory is that of the process; what importing
the libraries takes is told apart, because it is the same for both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.work import SHAPES, model_folder, prompt_rows

BASES = {"full precision": None, "nf4": "nf4"}
RESPONSE, ROWS, TOKENS_AT_ONCE = 48, 32, 2048


MAKE = """
import json, sys
from pathlib import Path
from align.chat.templates import prepare_tokenizer
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.recipe.settings import AdapterSettings

source, work, quantize = source_of(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = load_tokenizer(source)
prepare_tokenizer(tokenizer, None)
save_checkpoint(load_policy(source, tokenizer=tokenizer, precision="float32"), tokenizer, work / "base")
for name, load in (("start", load_policy), ("reward", load_reward)):
    adapter = {"adapter": AdapterSettings(rank=16), "quantize": quantize, "trainable": True, "precision": "float32"}
    save_checkpoint(load(source_of(work / "base"), **adapter), tokenizer, work / name)
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["15m", "135m"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write("RESULT " + json.dumps(measured(*options.one)) + "\n")
        return
    text = page(options.shapes)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def page(shapes: list[str]) -> str:
    """The table as Markdown."""
    lines = [
        "# Memory of four roles on one base",
        "",
        f"Made by `python benchmarks/ppo_memory.py --shapes {' '.join(shapes)} --out docs/ppo-memory.md`: {ROWS} rows of about "
        f"100 tokens, {TOKENS_AT_ONCE} tokens at once, LoRA of rank 16 on every linear layer, float32, one core. Peak MiB of the "
        "process; the libraries' share is what the process has after its imports.",
        "",
        "| shape | base | sft | ppo, four roles | ratio | libraries | ratio without them |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        for base in BASES:
            sft, ppo = (run(what, shape, base) for what in ("sft", "ppo"))
            libraries = sft["libraries"]
            bare = (ppo["peak"] - ppo["libraries"]) / (sft["peak"] - libraries)
            cells = f"{sft['peak']:,.0f} | {ppo['peak']:,.0f} | {ppo['peak'] / sft['peak']:.2f} | {libraries:,.0f} | {bare:.2f}"
            lines.append(f"| {shape} | {base} | {cells} |")
    return "\n".join(lines) + "\n"


def run(what: str, shape: str, base: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", what, shape, base], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def measured(what: str, shape: str, base: str) -> dict[str, float]:
    """Peak MiB of two optimiser steps of sft, or of two rounds of ppo."""
    from align.models.loading import AdapterSettings
    from align.trainer import train

    libraries = peak()
    folder = model_folder(shape)
    rows = [ids[:64] for ids in prompt_rows(ROWS, SHAPES[shape]["vocab_size"])]
    with tempfile.TemporaryDirectory() as work:
        task, progress = (sft_task if what == "sft" else ppo_task)(
            folder, rows, Path(work), AdapterSettings(rank=16), BASES[base]
        )
        train(task, progress)
    return {"peak": peak(), "libraries": libraries}


def sft_task(folder: str, rows: list[list[int]], work: Path, adapter: Any, quantize: Any) -> Any:
    """Supervised fine-tuning on rows as long as ppo's prompts with their responses."""
    from align.chat.encoded import Encoded
    from align.models.loading import load_policy
    from align.models.source import source_of
    from align.progress import Progress
    from align.recipe.settings import SftSettings
    from align.stages.objectives import AnswerLoss
    from align.trainer import Task

    settings = SftSettings.model_validate({
        "kind": "sft", "data": "x", "adapter": adapter.model_dump(), "quantize": quantize, "batch_size": ROWS // 2,
        "batch_tokens": TOKENS_AT_ONCE, "precision": "float32",
    })  # fmt: skip
    model = load_policy(source_of(folder), adapter=adapter, quantize=quantize, trainable=True, precision="float32")
    examples = [Encoded([*ids, *ids[:1] * RESPONSE], [False] * len(ids) + [True] * RESPONSE) for ids in rows]
    return Task(model, AnswerLoss(), examples, [], settings, 0, work / "state"), Progress()


def ppo_task(folder: str, rows: list[list[int]], work: Path, _adapter: Any, quantize: Any) -> Any:
    """Two rounds of ppo with every role an adapter on the base."""
    from align.advantages import KlController, RunningMoments
    from align.data.examples import Message, Prompt
    from align.memory import Budget
    from align.models.adapters import put_reward_adapter
    from align.models.folders import load_tokenizer
    from align.models.roles import AdapterReward, RoleOpener
    from align.models.source import source_of
    from align.ppo.collection import Collector, Controls
    from align.ppo.encoding import EncodedPrompt
    from align.ppo.objective import PpoLoss
    from align.ppo.prompts import RoundStream
    from align.ppo.proof import Proof
    from align.progress import Progress
    from align.recipe.settings import PpoSettings
    from align.rewards.model import RewardModel, context_encoder
    from align.rewards.total import build_rewards
    from align.rollout.engine import LocalEngine
    from align.trainer import Task

    base, start, reward = work / "base", work / "start", work / "reward"
    # in a process of its own: making them is no part of what is measured
    subprocess.run([sys.executable, "-c", MAKE, folder, str(work), json.dumps(quantize)], check=True)
    tokenizer = load_tokenizer(source_of(base))
    settings = PpoSettings.model_validate({
        "kind": "ppo", "prompts": "x", "reward": "reward", "rollouts": ROWS, "batch_size": ROWS // 2, "round_epochs": 1,
        "rounds": 2, "max_new_tokens": RESPONSE, "batch_tokens": TOKENS_AT_ONCE, "precision": "float32",
        "learning_rate": 1e-5, "missing_stop_penalty": 0.0,
    })  # fmt: skip
    roles = RoleOpener(settings, source_of(start), None, tokenizer, 0, work).open()
    head = put_reward_adapter(roles.policy, "reward", source_of(reward), trainable=False)
    shared = AdapterReward(roles.policy, "reward", head)
    model = RewardModel(shared, context_encoder(shared, tokenizer))
    prompts = [EncodedPrompt(Prompt((Message("user", "w9"),)), ids) for ids in rows]
    rewards, none = (build_rewards(terms, models={"reward": model}, judges={}) for terms in (settings.reward, []))
    controls = Controls(KlController(0.05, None, 10_000), RunningMoments())
    engine = LocalEngine(tokenizer, [tokenizer.eos_token_id])
    collector = Collector(settings, prompts, engine, rewards, none, controls, Budget.of(settings), 0, Progress())
    stream = RoundStream(2, settings, 0)
    objective = PpoLoss(settings, collector, stream.steps_per_round, lambda *_: {}, Proof(True), Progress())
    rates = dict.fromkeys(roles.value_names, 1e-4)
    return Task(roles, objective, range(2 * ROWS), [], settings, 0, work / "state", (), stream, rates), Progress()


def peak() -> float:
    """Peak resident MiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
