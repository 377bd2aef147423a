"""The one optimisation loop: rows in random order, an objective, AdamW. It knows no algorithm.

It stands on `transformers.Trainer`, which brings devices, optimisers, schedules and logging integrations. Three things
are ours. One item of the data loader is one whole optimiser step, cut into micro-batches by a token budget, so that the
result does not depend on what fits into memory. The whole run is one pass over a stream of shuffled epochs, so that a
resumed run goes on with the very next row. And a number that is not finite stops the run at once, with the rows named.
"""

from __future__ import annotations

import math
import os
import signal
import time
from abc import abstractmethod
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
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align.batches import epoch_order, micro_batches
from align.errors import Interrupted, StageFailed
from align.models.folders import quiet
from align.models.hardware import compute_dtype, width_of
from align.models.logps import is_padded
from align.objective import Objective
from align.parallel.sharing import Sharing, sharing_of
from align.progress import Bar, Progress
from align.recipe.settings import TrainingSettings
from align.state import complete_states, mark_complete, step_of
from align.stopping import stop_requested, stops_at_boundary

TRAINED = "trained.safetensors"  # in a state: the weights that train, and no others


@dataclass(frozen=True)
class Task:
    """All that one training needs. `held_out` rows are only measured; `state` keeps what a resumed run needs.

    stream: the rows of each optimiser step; None: shuffled epochs. own_rates: peak learning rates of parameters, by
    name, where they differ from the settings'; their gradients are clipped apart from the others.
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


def train(task: Task, progress: Progress) -> int:
    """Train the model in place, going on from the last complete state if there is one. Returns the steps that were made.

    Other processes of this run join in where the stage allows it; they leave it here, with Released. Raises StageFailed
    when loss or gradient is not finite, Interrupted when a signal asked to stop.
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
        with _memory_explained(task.settings):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if number := stop_requested():
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of {len(stream)}; its state is saved",
            "The same command goes on from there.",
        )
    sharing.finish()
    return int(trainer.state.global_step)


def steps_of(rows: int, settings: TrainingSettings) -> int:
    """Optimiser steps of a run over that many rows."""
    steps = math.ceil(_rows_of_run(rows, settings) / settings.batch_size)
    return min(steps, settings.max_steps or steps)


def _rows_of_run(rows: int, settings: TrainingSettings) -> int:
    """How often a row is seen in a whole run: all epochs together, one row at least."""
    return max(1, round(settings.epochs * rows))


class Stream(Sampler[list[int]]):
    """Row numbers of each optimiser step. The same numbers in the same order whenever it is asked."""

    @abstractmethod
    def __len__(self) -> int:
        """Optimiser steps of the run."""


class RowStream(Stream):
    """Row numbers of each optimiser step: one shuffled epoch after the other, cut into batches across their seams."""

    def __init__(self, rows: int, settings: TrainingSettings, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.batch_size = settings.batch_size
        self.steps = steps_of(rows, settings)
        self.total = min(_rows_of_run(rows, settings), self.steps * settings.batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for position in range(self.total):
            epoch, offset = divmod(position, self.rows)
            if offset == 0:
                order = epoch_order(self.rows, self.seed, epoch)
            batch.append(order[offset])
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


@contextmanager
def _memory_explained(settings: TrainingSettings) -> Iterator[None]:
    """A device that is too small, as our error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageFailed(
            f"out of memory with batch_tokens: {settings.batch_tokens} ({str(error).splitlines()[0]})",
            "Lower batch_tokens (the result stays the same), or set gradient_checkpointing: true.",
        ) from error


def measure(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[Any],
    settings: TrainingSettings,
    sharing: Sharing | None = None,
) -> dict[str, float]:
    """Mean loss and metrics of the objective over `rows`, without training; {} when there are none."""
    if not rows:
        return {}
    sharing = sharing or Sharing(model)
    was_training = model.training
    model.eval()
    sums: Counter[str] = Counter()
    with torch.no_grad():
        with autocast(model, settings.precision):
            rows = sharing.through(lambda model: objective.prepared(model, rows))
        lengths = [objective.tokens(row) for row in rows]
        for group, counts in sharing.groups(lengths, _cut(model, settings)):
            with autocast(model, settings.precision):
                loss, more = _loss_of(sharing, objective, [rows[i] for i in group])
            if counts:
                sums.update({"loss": float(loss), **more})
    model.train(was_training)
    weight = objective.weight(rows)
    return {name: total / weight for name, total in sharing.merged(sums).items()}


def _cut(model: nn.Module, settings: TrainingSettings) -> partial[list[list[int]]]:
    """Lengths of rows -> micro-batches."""
    return partial(micro_batches, budget=settings.batch_tokens, padded=is_padded(model))


def _loss_of(sharing: Sharing, objective: Objective, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
    return sharing.through(lambda model: objective(model, rows))


def autocast(model: nn.Module, precision: str) -> torch.autocast:
    """Arithmetic in the precision asked for; weights that train stay float32."""
    config: Any = model.config
    dtype = compute_dtype(precision, width_of(config))
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


class _StepTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """transformers' Trainer with our optimiser step, our log and our check for finite numbers."""

    bar: Bar
    _kept: dict[str, Tensor]  # of a state that is being saved, like the optimiser's
    _optimizer_state: dict[str, Any]

    def __init__(self, task: Task, stream: Stream, progress: Progress, sharing: Sharing) -> None:
        self.task, self.stream, self.progress, self.sharing = task, stream, progress, sharing
        self._sums: Counter[str] = Counter()
        self._weight = 0.0
        self._losses: list[float] = []  # of the steps that learnt something
        self._tokens, self._since = 0, time.perf_counter()
        self._current: list[int] = []
        arguments = _arguments(task, len(stream), task.seed + sharing.rank)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.state.parent / "tensorboard")  # outlives the state
        super().__init__(model=sharing.model, args=arguments, train_dataset=_Rows(task.rows), data_collator=list)
        self.remove_callback(PrinterCallback)
        self.add_callback(_AtStepEnd(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.stream, collate_fn=list)

    def training_step(self, model: nn.Module, inputs: list[tuple[int, Any]], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        objective, settings = self.task.objective, self.task.settings
        self._current = [number for number, _ in inputs]
        total = torch.zeros((), device=self.args.device)
        with autocast(model, settings.precision):
            step = [row for _, row in inputs]
            rows = self.sharing.through(lambda model: objective.prepared(model, step))
        if not rows:
            self.bar.advance(1)
            return total
        lengths = [objective.tokens(row) for row in rows]
        weight = objective.weight(rows)
        for group, counts in self.sharing.groups(lengths, _cut(model, settings)):
            with autocast(model, settings.precision):
                loss, sums = _loss_of(self.sharing, objective, [rows[i] for i in group])
            self.accelerator.backward(loss / (weight / self.sharing.scale) if counts else loss * 0.0)
            if counts:
                total += loss.detach()
                self._sums.update(sums)
        self.sharing.add_gradients()
        total = self.sharing.summed(total)
        self._weight += weight
        self._tokens += sum(lengths)
        mean = total / weight
        self._refuse_unless_finite("loss", float(mean))
        self._losses.append(float(mean))
        self.bar.advance(1, tokens=sum(lengths), note=f"loss {float(mean):.3f}")
        return mean

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        own = self.task.own_rates
        named = [(name, weight) for name, weight in model.named_parameters() if weight.grad is not None]
        limit = self.args.max_grad_norm
        apart = self.accelerator.clip_grad_norm_([weight for name, weight in named if name in own], limit)
        self._refuse_unless_finite("gradient norm of the value model", float(apart or 0.0))
        norm = self.accelerator.clip_grad_norm_([weight for name, weight in named if name not in own], limit)
        self._refuse_unless_finite("gradient norm", float(norm))
        return norm

    def _refuse_unless_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise StageFailed(
                f"the {what} is {value} at step {self.state.global_step + 1}, on training rows {sorted(self._current)}",
                "Nothing was saved after the last complete state. Lower learning_rate, or use precision: float32.",
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.sharing.merged(self._sums)
            means = {name: total / self._weight for name, total in sums.items()} if self._weight else {}
            now = time.perf_counter()
            loss = sum(self._losses) / len(self._losses) if self._losses else 0.0
            logs = {**logs, "loss": loss, **means, "tokens_per_second": self._tokens / (now - self._since)}
            self._sums, self._weight, self._losses = Counter(), 0.0, []
            self._tokens, self._since = 0, now
            self.progress.metrics(self.state.global_step, {f"train.{name}": float(v) for name, v in logs.items()})
        super().log(logs, start_time)

    def measure_held_out(self) -> None:
        """Held-out loss and metrics at this step, into the log."""
        began = time.perf_counter()
        numbers = measure(self.model, self.task.objective, self.task.held_out, self.task.settings, self.sharing)
        self._since += time.perf_counter() - began  # not a time in which tokens are trained
        self.progress.metrics(self.state.global_step, {f"eval.{name}": value for name, value in numbers.items()})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        _split_groups(optimizer, self.model, self.task.own_rates)
        return optimizer  # type: ignore[no-any-return]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._kept, folder / TRAINED)
        self.task.objective.save(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        torch.save(self._optimizer_state, Path(output_dir) / OPTIMIZER_NAME)
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

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.sharing.leads:  # the noise of dropout is not to be the same in all processes
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._kept = {name: self.sharing.whole(weight) for name, weight in _trained(self.model).items()}
        self._optimizer_state = self.sharing.optimizer_state(self.optimizer)
        if self.sharing.leads:
            with quiet():
                super()._save_checkpoint(model, trial)
            mark_complete(self.task.state, self.state.global_step)
        self._kept, self._optimizer_state = {}, {}


class _AtStepEnd(TrainerCallback):  # type: ignore[misc]
    """After each step: stop and save when a signal asked for it; log the first and the last; measure a few times."""

    def __init__(self, trainer: _StepTrainer) -> None:
        self.trainer = trainer
        self.every = max(1, math.ceil(len(trainer.stream) / 5))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        if self.trainer.sharing.stop_agreed():
            control.should_save = control.should_log = control.should_training_stop = True
        elif self.trainer.task.objective.finished:
            control.should_log = control.should_training_stop = True
        elif state.global_step % self.every == 0:
            self.trainer.measure_held_out()


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
