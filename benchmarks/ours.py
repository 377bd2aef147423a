"""align on the work of a file, in a process of its own. Prints one line, RESULT and JSON; bench.py starts it.

prepare   the folders that both sides start from, and the precision that align would choose
train     align.trainer.train with the product's defaults and allocator
bare      the same objective in the shortest loop that trains the same: no Trainer, log, checks or saved state
matrix    the machine's limit: products of two 4096-cube matrices
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.work import SHAPES, StepClock, model_folder, peak_mib, read_work, say, training_flops

ADAPTER_RANK = 16
CUBE = 4096


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "train", "bare", "matrix"])
    parser.add_argument("--work", required=True)
    options = parser.parse_args()
    from align.allocator import begin_tuned
    from align.quiet import quiet_libraries

    quiet_libraries()
    begin_tuned()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = read_work(options.work)
    if options.what == "prepare":
        say(prepare(work))
    elif options.what == "matrix":
        say(matrix(work["precision"]))
    else:
        say(run(work, bare=options.what == "bare"))


def prepare(work: dict[str, Any]) -> dict[str, Any]:
    """`model`: folder of the base; `start`: of what is trained (an adapter, a classifier with a head, or the base)."""
    from align.models.folders import load_tokenizer
    from align.models.hardware import compute_dtype, device
    from align.models.loading import load_policy, load_reward
    from align.models.saving import save_checkpoint
    from align.models.source import source_of
    from align.recipe.settings import AdapterSettings

    model = model_folder(work["shape"])
    precision = work["precision"] or str(compute_dtype("auto", SHAPES[work["shape"]]["hidden_size"])).split(".")[1]
    source, start = source_of(model), Path(work["folder"]) / "start"
    if work["kind"] == "reward":
        save_checkpoint(load_reward(source, trainable=True), load_tokenizer(source), start)
    elif work["adapter"]:
        adapter = AdapterSettings(rank=ADAPTER_RANK)
        begun = load_policy(
            source, adapter=adapter, quantize=work["quantize"], trainable=True, precision=precision
        )  # fmt: skip
        save_checkpoint(begun, load_tokenizer(source), start)
    else:
        start = Path(model)
    return {"model": model, "start": str(start), "precision": precision, "device": device().type}


def run(work: dict[str, Any], *, bare: bool) -> dict[str, Any]:
    """All steps. total_seconds: of the whole training, its last saved state too; reference_seconds: of DPO's reference."""
    from align.models.loading import load_policy, load_reward
    from align.models.source import source_of

    steps, precision = work["warmup"] + work["steps"], work["precision"]
    load = load_reward if work["kind"] == "reward" else load_policy
    model = load(source_of(work["start"]), trainable=True, precision=precision)
    settings = _settings(work)
    began = time.perf_counter()
    objective, rows = _objective(work, settings, model, work["rows"][: steps * work["batch"]])
    reference_seconds = time.perf_counter() - began
    clock = StepClock(work["warmup"])
    watched = watch(objective, clock)
    start = time.perf_counter()
    if bare:
        _bare_loop(model, watched, rows, settings)
    else:
        _product(model, watched, rows, settings, clock)
    total = time.perf_counter() - start
    clock_end = clock.result() if not bare else {"losses": clock.losses}
    lengths = [len(row) for row in work["rows"][work["warmup"] * work["batch"] : steps * work["batch"]]]
    return {
        "units": sum(clock.tokens), **clock_end, "total_seconds": total, "peak_mib": peak_mib(),
        "reference_seconds": reference_seconds,
        "flops": training_flops(work["shape"], lengths) if work["kind"] == "sft" else None,
    }  # fmt: skip


def _settings(work: dict[str, Any]) -> Any:
    """The defaults, but for what both sides are told."""
    from align.recipe.settings import DpoSettings, RewardSettings, SftSettings

    told = {
        "kind": work["kind"], "data": "x", "batch_size": work["batch"], "learning_rate": work["learning_rate"],
        "schedule": "constant", "warmup": 0.0, "precision": work["precision"],
    }  # fmt: skip
    if work["kind"] == "dpo":
        return DpoSettings.model_validate({**told, "beta": work["beta"]})
    return {"sft": SftSettings, "reward": RewardSettings}[work["kind"]].model_validate(told)


def _objective(work: dict[str, Any], settings: Any, model: Any, rows: list[Any]) -> tuple[Any, list[Any]]:
    """The stage's objective and its rows; for DPO with the reference's log-probabilities, as the stage computes them."""
    from align.chat.encoded import Encoded, EncodedPair
    from align.progress import Progress
    from align.stages.objectives import AnswerLoss, ComparedPair, PreferenceLoss, RewardLoss
    from align.stages.reference import as_floats, reference_logps
    from align.steps import autocast

    if work["kind"] == "sft":
        return AnswerLoss(), [Encoded(ids, [True] * len(ids)) for ids in rows]

    def side(row: dict[str, list[int]], name: str) -> Encoded:
        prompt, reply = row["prompt_ids"], row[f"{name}_ids"]
        return Encoded(prompt + reply, [False] * len(prompt) + [True] * len(reply))

    pairs = [
        EncodedPair(side(row, "chosen"), side(row, "rejected"), len(row["prompt_ids"]), None, None) for row in rows
    ]
    if work["kind"] == "reward":
        return RewardLoss(centering=settings.centering), pairs
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    with tempfile.TemporaryDirectory() as cache, autocast(model, settings.precision):
        logps = as_floats(reference_logps(model, sides, Path(cache), ["bench"], Progress()).sums)
    compared = [ComparedPair(pair, *logps[2 * i : 2 * i + 2]) for i, pair in enumerate(pairs)]
    return PreferenceLoss(settings.loss, beta=settings.beta), compared


def watch(objective: Any, clock: StepClock) -> Any:
    """The objective with a clock on its steps; all else stays as it is."""

    class Watched(type(objective)):  # type: ignore[misc]
        def prepared(self, model: Any, rows: Any) -> Any:
            clock.step_begins(sum(self.tokens(row) for row in rows))
            found = super().prepared(model, rows)
            clock.losses.append(0.0)
            self.step_weight = self.weight(found)
            return found

        def __call__(self, model: Any, rows: Any) -> Any:
            loss, sums = super().__call__(model, rows)
            clock.losses[-1] += float(loss.detach()) / self.step_weight
            return loss, sums

    objective.__class__ = Watched
    return objective


def _product(model: Any, objective: Any, rows: list[Any], settings: Any, clock: StepClock) -> None:
    from align.progress import Progress
    from align.streams import Stream
    from align.trainer import Task, train

    steps = len(rows) // settings.batch_size

    class InOrder(Stream):
        def __len__(self) -> int:
            return steps

        def __iter__(self) -> Any:
            for first in range(0, steps * settings.batch_size, settings.batch_size):
                yield list(range(first, first + settings.batch_size))

    class Listener(Progress):
        def metrics(self, step: int, values: Any) -> None:
            if step == steps and "train.loss" in values:
                clock.training_ends()

    with tempfile.TemporaryDirectory() as folder:
        task = Task(model, objective, rows, [], settings, 0, Path(folder) / "state", (), InOrder())
        train(task, Listener())


def _bare_loop(model: Any, objective: Any, rows: list[Any], settings: Any) -> None:
    import torch

    from align.batches import micro_batches
    from align.models.logps import is_padded
    from align.steps import autocast

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    for first in range(0, len(rows), settings.batch_size):
        step_rows = objective.prepared(model, rows[first : first + settings.batch_size])
        weight = objective.weight(step_rows)
        lengths = [objective.tokens(row) for row in step_rows]
        for group in micro_batches(lengths, settings.batch_tokens, padded=is_padded(model)):
            with autocast(model, settings.precision):
                loss, _ = objective(model, [step_rows[i] for i in group])
            (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def matrix(precision: str) -> dict[str, Any]:
    """Operations per second of the best of four products, the first of which warms up."""
    import torch

    one = torch.randn(CUBE, CUBE).to(getattr(torch, precision))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds[1:]), "flops_per_second": 2 * CUBE**3 / min(seconds[1:]), "peak_mib": peak_mib()}


if __name__ == "__main__":
    main()
