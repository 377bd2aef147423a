"""The one optimisation loop: rows in random order, an objective, AdamW. It knows no algorithm.

It stands on `transformers.Trainer`, which brings devices, optimisers, schedules and logging integrations. Three things
are ours. One item of the data loader is one whole optimiser step, cut into micro-batches by a token budget, so that the
result does not depend on what fits into memory (steps.py). The whole run is one pass over a stream of shuffled epochs, so
that a resumed run goes on with the very next row (streams.py). And a step that must not be taken is never taken.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align.bad_steps import StepWatch, require_finite
from align.errors import Interrupted, lacks_memory
from align.memory import Budget, out_of_memory
from align.models.folders import quiet
from align.objective import Objective
from align.parallel.sharing import Sharing, sharing_of
from align.progress import Bar, Progress
from align.recipe.settings import TrainingSettings
from align.saves import Saves, copied, waits_for_disk
from align.state import complete_states, mark_complete, step_of
from align.steps import Step, Stepper, measure
from align.stopping import stop_requested, stops_at_boundary
from align.streams import RowStream, Stream

TRAINED = "trained.safetensors"  # in a state: the weights that train, and no others
LOOP = "loop.json"  # in a state: what the loop itself has learnt of its steps


@dataclass(frozen=True)
class Task:
    """All that one training needs. `held_out` rows are only measured; `state` keeps what a resumed run needs.

    stream: the rows of each optimiser step; None: shuffled epochs. own_rates: peak learning rates of parameters, by
    name, where they differ from the settings'; their gradients are clipped apart from the others. budget: where the
    objective shares it; None: as the settings say. save_aside: whether states are written in a thread; None: where the
    device gains by it.
    """

    model: nn.Module
    objective: Objective
    rows: Sequence[Any]
    held_out: Sequence[Any]
    settings: TrainingSettings
    seed: int
    state: Path
    log_to: Sequence[str] = ()
    stream: Stream | None = None
    own_rates: Mapping[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    save_aside: bool | None = None


@dataclass(frozen=True)
class Trained:
    """How a training went. steps: those that were skipped count. batch_tokens: with `fit: auto`, what went through the model
    at once in the end."""

    steps: int
    skipped_steps: int
    batch_tokens: int | None

    def as_metrics(self) -> dict[str, Any]:
        """What the record of a checkpoint says of it, where there is something to say."""
        said = {"skipped_steps": self.skipped_steps or None, "batch_tokens": self.batch_tokens}
        known = {name: value for name, value in said.items() if value is not None}
        return {"training": {"steps": self.steps, **known}} if known else {}


def train(task: Task, progress: Progress) -> Trained:
    """Train the model in place, going on from the last complete state if there is one.

    Other processes of this run join in where the stage allows it; they leave it here, with Released. Raises StageFailed
    for a step that must not be taken, or that does not fit into memory, where the settings do not say otherwise, for a run
    whose steps were mostly bad, and for a held-out number that is not finite; Interrupted when a signal asked to stop.
    """
    stream = task.stream or RowStream(len(task.rows), task.settings, task.seed)
    sharing = sharing_of(task.model)
    states = complete_states(task.state, lambda sentence: progress.note(f"warning: {sentence}"))
    last = sharing.told(next(reversed(states), None))
    trainer = _StepTrainer(task, stream, progress, sharing)
    done = step_of(last) if last else 0
    progress.rewind(done)
    with progress.bar("training", len(stream)) as bar, stops_at_boundary():
        trainer.bar = bar
        bar.advance(done)
        with _memory_explained(), trainer.saves:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if number := stop_requested():
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of {len(stream)}; its state is saved",
            "The same command goes on from there.",
        )
    trainer.watch.require_good_steps()
    sharing.finish()
    return trainer.trained


@contextmanager
def _memory_explained() -> Iterator[None]:
    """A device that is too small for what is not cut into micro-batches, as our error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        hint = (
            "Other than in a micro-batch: train an adapter, quantize: nf4, or a smaller model; for ppo, fewer rollouts."
        )
        raise out_of_memory(error, "in training", hint) from error


class _StepTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """transformers' Trainer with our optimiser step, our log and our saved states."""

    bar: Bar

    def __init__(self, task: Task, stream: Stream, progress: Progress, sharing: Sharing) -> None:
        self.task, self.stream, self.progress, self.sharing = task, stream, progress, sharing
        self.budget = task.budget or Budget.of(task.settings, progress.note)
        self.watch = StepWatch(task.settings)
        self._stepper = Stepper(
            sharing, task.objective, task.settings, self.budget, self.watch, frozenset(task.own_rates), progress.note
        )
        self._step: Step | None = None
        self._left_out = False  # whether the last step was skipped
        self._sums: Counter[str] = Counter()
        self._weight = 0.0
        self._losses: list[float] = []  # of the steps that learnt something
        self._tokens, self._since = 0, time.perf_counter()
        arguments = _arguments(task, len(stream), task.seed + sharing.rank)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.state.parent / "tensorboard")  # outlives the state
        super().__init__(model=sharing.model, args=arguments, train_dataset=_Rows(task.rows), data_collator=list)
        self.saves = Saves(aside=waits_for_disk(self.args.device) if task.save_aside is None else task.save_aside)
        self.remove_callback(PrinterCallback)
        self.add_callback(_AtStepEnd(self))

    @property
    def trained(self) -> Trained:
        """How it went."""
        fitted = self.budget.tokens if self.task.settings.fit == "auto" else None
        return Trained(int(self.state.global_step), self.watch.skipped, fitted)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.stream, collate_fn=list)

    def training_step(self, model: nn.Module, inputs: list[tuple[int, Any]], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        numbers, rows = [number for number, _ in inputs], [row for _, row in inputs]
        skipped = self.watch.skipped
        self._step = step = self._stepper.make(numbers, rows, self.state.global_step + 1)
        self._left_out = self.watch.skipped > skipped
        if step is None:
            self.bar.advance(1)
            return torch.zeros((), device=self.args.device)
        self._sums.update(step.sums)
        self._weight += step.weight
        self._tokens += step.tokens
        self._losses.append(step.loss)
        self.bar.advance(1, tokens=step.tokens, note=f"loss {step.loss:.3f}")
        return torch.tensor(step.loss, device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        """Of the policy, where a value model trains beside it. The step has clipped its gradients already."""
        return self._step.norms.get("gradient norm", 0.0) if self._step else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.pop("loss", None) is not None:
            sums = self.sharing.merged(self._sums)
            means = {name: total / self._weight for name, total in sums.items()} if self._weight else {}
            now = time.perf_counter()
            if self._losses:
                logs["loss"] = sum(self._losses) / len(self._losses)
            if self._left_out:  # its gradient was no number, and 0 would be a false one
                logs.pop("grad_norm", None)
            logs |= {**means, "tokens_per_second": self._tokens / (now - self._since)}
            logs |= {name: value for name, value in vars(self.trained).items() if value and name != "steps"}
            self._sums, self._weight, self._losses = Counter(), 0.0, []
            self._tokens, self._since = 0, now
            self.progress.metrics(self.state.global_step, {f"train.{name}": float(v) for name, v in logs.items()})
        super().log(logs, start_time)

    def measure_held_out(self) -> None:
        """Held-out loss and metrics at this step, into the log."""
        began, task = time.perf_counter(), self.task
        numbers = measure(self.model, task.objective, task.held_out, task.settings, self.sharing, self.budget)
        self._since += time.perf_counter() - began  # not a time in which tokens are trained
        require_finite(numbers, f"after step {self.state.global_step}")
        self.progress.metrics(self.state.global_step, {f"eval.{name}": value for name, value in numbers.items()})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        _split_groups(optimizer, self.model, self.task.own_rates)
        return optimizer  # type: ignore[no-any-return]

    # States -----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Small files now, the tensors as they are now, written when `saves` comes to it; the mark that counts is last."""
        self.saves.wait()
        kept: Any = {name: self.sharing.whole(weight) for name, weight in _trained(self.model).items()}
        moments: Any = self.sharing.optimizer_state(self.optimizer)
        if not self.sharing.leads:
            return
        if self.saves.aside and not self.sharing.copies:
            kept, moments = copied(kept), copied(moments)
        with quiet():
            super()._save_checkpoint(model, trial)
        self.saves.begin(partial(_write, self.task.state, int(self.state.global_step), kept, moments))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.task.objective.save(folder)
        loop = {"batch_tokens": self.budget.tokens, "watch": self.watch.state()}
        (folder / LOOP).write_text(json.dumps(loop), encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.sharing.place_state(self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved, trained = load_file(folder / TRAINED), _trained(self.model)
        assert saved.keys() == trained.keys(), "a state is only resumed by the run that saved it"
        for name, values in saved.items():
            self.sharing.copy_into(trained[name], values)
        self.task.objective.load(folder)
        loop = json.loads((folder / LOOP).read_text(encoding="utf-8"))
        self.budget.tokens = loop["batch_tokens"]
        self.watch.restore(loop["watch"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.sharing.leads:  # the noise of dropout is not to be the same in all processes
            super()._load_rng_state(checkpoint)


class _AtStepEnd(TrainerCallback):  # type: ignore[misc]
    """After each step: stop and save when a signal asked for it; log the first and the last; measure a few times."""

    def __init__(self, trainer: _StepTrainer) -> None:
        self.trainer = trainer
        self.every = max(1, math.ceil(len(trainer.stream) / 5))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.saves.check()
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        if self.trainer.sharing.stop_agreed():
            control.should_save = control.should_log = control.should_training_stop = True
        elif self.trainer.task.objective.finished:
            control.should_log = control.should_training_stop = True
        elif state.global_step % self.every == 0:
            self.trainer.measure_held_out()


def _write(states: Path, step: int, trained: dict[str, Tensor], moments: dict[str, Any]) -> None:
    """The tensors of a state, then its mark."""
    folder = states / f"checkpoint-{step}"
    save_file(trained, folder / TRAINED)
    torch.save(moments, folder / OPTIMIZER_NAME)
    mark_complete(states, step)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What an optimiser step may change, by name; tied weights once."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def _split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Moves parameters with a learning rate of their own into groups of their own."""
    own = {id(weight): rates[name] for name, weight in model.named_parameters() if name in rates}
    for group in list(optimizer.param_groups):
        for rate in sorted({own[id(weight)] for weight in group["params"] if id(weight) in own}):
            moved = [weight for weight in group["params"] if own.get(id(weight)) == rate]
            group["params"] = [weight for weight in group["params"] if own.get(id(weight)) != rate]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


class _Rows:
    """Rows with their numbers, so that an error can name them."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.rows[number]


def _arguments(task: Task, steps: int, seed: int) -> TrainingArguments:
    settings = task.settings
    extra: Mapping[str, Any] = {"neftune_noise_alpha": settings.neftune} if settings.neftune else {}
    arguments = TrainingArguments(
        output_dir=str(task.state),
        max_steps=steps,
        learning_rate=settings.peak_learning_rate(),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=int(settings.warmup * steps),
        optim={"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}[settings.optimizer],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        report_to=list(task.log_to),
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
        **extra,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process uses one device: no DataParallel around the model
    return arguments
