"""One short run of every stage, with what could make a resumed one differ, and processes that can be killed in it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.progress import Progress
from tests.critique_kit import Port, brisk_llama, port_in, rows
from tests.faults import Faults

STEPS = "epochs: 4.0, max_steps: 8, batch_size: 3, learning_rate: 1.0e-3, batch_tokens: 60, save_steps: 2, log_steps: 1"  # 8 steps
LORA = "adapter: {kind: lora, rank: 4}"
ROUNDS = (
    "kind: ppo, prompts: asked, reward: {kind: regex, pattern: e}, rollouts: 8, rounds: 2, round_epochs: 2, batch_size: 4,"
    " max_new_tokens: 6, learning_rate: 1.0e-2, missing_stop_penalty: 0.0, save_steps: 2, log_steps: 1, batch_tokens: 60"
)  # 8 steps
SKIPS = "bad_steps: skip, exploding_norm: 1.0001"  # half of all norms are above their median
MORE = "evaluation: {rows: 2, max_new_tokens: 4}\n"
PAIR_LOSSES = ("sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "cpo", "apo-zero")


@dataclass(frozen=True)
class Case:
    """A stage named x in YAML, on a model. quick: one of its kind that belongs to the fast tests. few: good steps that are
    enough to call others unusual; None: as many as ever."""

    stage: str
    model: str = "brisk"
    quick: bool = False
    few: int | None = None

    @property
    def trains(self) -> bool:
        """Whether it has optimiser steps, and not rows of a critic."""
        return "critique" not in self.stage


CASES = {
    "pretrain": Case(f"{{kind: pretrain, data: text, {STEPS}}}", quick=True),
    "pretrain-from-scratch": Case(f"{{kind: pretrain, data: text, from_scratch: true, {STEPS}}}"),
    "sft-dropout-neftune": Case(f"{{kind: sft, data: talk, neftune: 5.0, {STEPS}}}", "tiny_gpt2", quick=True),
    "sft-bfloat16": Case(f"{{kind: sft, data: talk, precision: bfloat16, schedule: linear, {STEPS}}}"),
    "sft-checkpointing": Case(f"{{kind: sft, data: talk, gradient_checkpointing: true, weight_decay: 0.1, {STEPS}}}"),
    "sft-lora-dropout": Case(f"{{kind: sft, data: talk, adapter: {{rank: 4, dropout: 0.3}}, {STEPS}}}"),
    "sft-pissa": Case(f"{{kind: sft, data: talk, adapter: {{rank: 4, init: pissa}}, {STEPS}}}"),
    "sft-nf4-dora": Case(f"{{kind: sft, data: talk, quantize: nf4, adapter: {{rank: 4, dora: true}}, {STEPS}}}"),
    "sft-int8": Case(f"{{kind: sft, data: talk, quantize: int8, {LORA}, {STEPS}}}"),
    "reward": Case(f"{{kind: reward, data: pairs, centering: 0.01, {STEPS}}}", quick=True),
    "reward-nf4": Case(f"{{kind: reward, data: pairs, quantize: nf4, {LORA}, {STEPS}}}"),
    "dpo-kto": Case(f"{{kind: dpo, data: pairs, loss: kto, {STEPS}}}", quick=True),
    "dpo-nf4": Case(f"{{kind: dpo, data: pairs, quantize: nf4, {LORA}, {STEPS}}}"),
    **{f"dpo-{loss}": Case(f"{{kind: dpo, data: pairs, loss: {loss}, {STEPS}}}") for loss in PAIR_LOSSES},
    "ppo-gae": Case(f"{{{ROUNDS}, {LORA}, kl_target: 0.5, kl_horizon: 100, normalize_reward: true}}", quick=True),
    "ppo-gae-model": Case(f"{{{ROUNDS}, value: {{kind: model, warmup_rounds: 1}}}}"),
    "ppo-gae-trunk": Case(f"{{{ROUNDS}, value: trunk, round_kl_limit: 0.05, measure_rounds: 1}}"),
    "ppo-rloo": Case(f"{{{ROUNDS}, estimator: {{kind: rloo, samples: 4}}}}"),
    "ppo-grpo": Case(f"{{{ROUNDS}, estimator: {{kind: grpo, samples: 4}}, kl_in: loss, kl_estimator: k3}}"),
    "ppo-reinforce++": Case(f"{{{ROUNDS}, estimator: reinforce++, kl_estimator: k2, {LORA}, quantize: nf4}}"),
    "sft-skips": Case(f"{{kind: sft, data: talk, {SKIPS}, {STEPS}}}", "tiny_gpt2", quick=True, few=1),
    "ppo-skips": Case(f"{{{ROUNDS}, {SKIPS}, value: {{kind: model, warmup_rounds: 1}}}}", few=4),
    "critique": Case("{kind: critique, prompts: asked, constitution: rules.yaml, samples: 3, max_new_tokens: 8}"),
}  # fmt: skip


def port_of(case: Case, folder: Path, model: Path) -> Port:
    """The recipe with its files in a new folder."""
    port = port_in(folder, model, {"x": case.stage}, MORE)
    rows(
        folder / "text.jsonl",
        ({"text": f"The {word} heron of the harbour carries {word * 3}."} for word in "abcdefghijklmnop"),
    )
    text = port.recipe.read_text().replace(
        "stages:\n", "  text: {path: text.jsonl, format: text, test_fraction: 0.0}\nstages:\n", 1
    )
    port.recipe.write_text(text.replace("test_fraction: 0.0", "test_fraction: 0.2"))
    return port


def made(port: Port) -> list[str]:
    """Content hashes of what stage x made: of all bytes of a checkpoint, or of its data sets."""
    registry = port.workshop().registry
    return sorted({record.id for record in (*registry.all_checkpoints(), *_by_runs(registry.all_data()))})


def skipped(port: Port) -> list[int]:
    """The steps that stage x left out."""
    registry = port.workshop().registry
    rows = registry.metrics(registry.all_runs()[0].id)
    counts = {row.step: row.value for row in rows if row.name == "train.skipped_steps"}
    return [step for step, count in sorted(counts.items()) if count > counts.get(step - 1, 0)]


def _by_runs(records: list[Any]) -> list[Any]:
    return [record for record in records if record.run]


# Processes to kill ---------------------------------------------------------------------------------------------------


class KillAt(Progress):
    """Kills this process in an optimiser step, before the weights move."""

    def __init__(self, step: int) -> None:
        self.step = step

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Any]:
        progress, done = self, 0

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                nonlocal done
                done += int(amount)
                if title == "training" and amount and done == progress.step:
                    os.kill(os.getpid(), signal.SIGKILL)

        yield Bar()


def work(folder: Path, step: int | None, calls: int, few: int | None = None) -> None:
    """Runs the recipe in `folder`, in this process; it is killed in a step, or at a call of the disk or the database.

    How many such calls there were is written to the file `calls`.
    """
    from align import bad_steps
    from align.critique import work as critique

    critique.ROWS_AT_ONCE = 2  # of 9 prompts
    if few is not None:
        bad_steps.FEWEST = few
    faults = Faults(calls, lambda _name: os.kill(os.getpid(), signal.SIGKILL))
    with faults.armed(after=True):
        Port(folder, folder / "port.yaml").run(progress=KillAt(step) if step else Progress())
    (folder / "calls").write_text(str(calls - faults.countdown))


NEVER = 10**9
FRESH = multiprocessing.get_context("forkserver")  # each child begins with everything imported and nothing computed
FRESH.set_forkserver_preload([
    "torch", "transformers.trainer", "peft", "bitsandbytes", "sqlalchemy", "align.run", "align.stages.sft", "align.stages.reward",
    "align.stages.dpo", "align.stages.ppo", "align.stages.critique", "tests.resume_cases",
])  # fmt: skip


def started(folder: Path, step: int | None = None, calls: int = NEVER, few: int | None = None) -> Any:
    """A process that does `work`."""
    process = FRESH.Process(target=work, args=(folder, step, calls, few))
    process.start()
    return process


def model_of(case: Case, request: Any) -> Path:
    """Folder of the case's model."""
    if case.model != "brisk":
        return Path(request.getfixturevalue(case.model))
    folder = Path(request.getfixturevalue("tmp_path_factory").getbasetemp()) / "brisk"
    return folder if folder.is_dir() else brisk_llama(request.getfixturevalue("tiny_tokenizer"), folder)
