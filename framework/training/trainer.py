"""The Trainer: takes objects, runs steps. It knows no names and no config.

    trainer = Trainer(max_epochs=10)
    trainer.fit(model, loader, task=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW(model.parameters()))

`loop.py` is the loop, and `step.py` the training step; `contracts/callback.py` lists the events.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, Literal

import torch
from torch import Tensor, nn

from framework.contracts.callback import Callback, listeners
from framework.contracts.logger import Logger
from framework.contracts.metric import Measures, Metric
from framework.contracts.schedule import Schedule
from framework.contracts.state import Cadence, Every, State, Stop
from framework.contracts.task import Task
from framework.contracts.transform import transforms_of
from framework.data.accumulation import (
    Source,
    count_steps,
    count_total,
    known_targets,
    other_order,
    steps,
)
from framework.data.dataset import READ_AGAIN, Batch, Data, ForeignLoader, Loader, check_data
from framework.errors import DataError, SettingError
from framework.errors.torch_errors import torch_errors
from framework.errors.user_code import describe
from framework.registry.annotations import PositiveInt
from framework.registry.schema import check_arguments
from framework.runtime import seeds
from framework.runtime.batch import move_batch
from framework.runtime.clock import Clock, Profiler
from framework.runtime.determinism import deterministic_algorithms
from framework.runtime.memory import MicroBatches, memory_errors
from framework.runtime.modes import Modes
from framework.runtime.precision import Format
from framework.system.files import check_disk_error, check_exists, disk_errors

from . import trainer_state
from .acceleration.callbacks import GradientCallbacks, gradient_callbacks
from .acceleration.compiled_step import Compile
from .acceleration.cuda_graph import CudaGraph
from .evaluator import Evaluator
from .log_record import checked_record
from .loop import run_epoch
from .optimizer_state import group_settings, mark_learning_rates, start_learning_rates
from .parameters import Parameters
from .step import TrainingStep, select_step, select_update
from .validation import (
    check_callbacks,
    check_fit,
    check_folder,
    check_loggers,
    check_metrics,
    check_micro_batches,
    check_phases,
    check_resume,
    check_schedule,
    check_single_sample,
    check_source,
    settings_refused,
    single_sample,
)


class Trainer(Evaluator):
    """Fits, evaluates and predicts with a model, some data, a task and an optimizer.

    Attributes:
        state: counters and the last metrics.
        at_boundary: no step is under way, so that `state_dict` is that of a run which can go on exactly.
        resumed_from: the step that `fit` went on from, or None.
        manifest: facts of the run that its checkpoints keep in their manifest.
        clock: where the time of `fit` went.
    """

    def __init__(
        self,
        max_epochs: PositiveInt | None = None,
        max_steps: PositiveInt | None = None,
        validate_every: Every = "1epoch",
        log_every: Every = "50steps",
        accumulate: PositiveInt = 1,
        micro_batch: PositiveInt | Literal["auto"] | None = None,
        compile: Compile = "off",
        cuda_graph: CudaGraph = "off",
        precision: Format = "fp32",
        device: str = "auto",
        deterministic: bool = False,
        profile: bool = False,
        *,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
        folder: Path | None = None,
    ):
        """Set the limits and the manner of a run.

        Args:
            max_epochs: passes over the training data, at most.
            max_steps: optimizer steps, at most; the run ends at whichever limit comes first.
            validate_every: when the validation split is measured; always at the end too.
            log_every: when training values are read off the device and logged; also at the end of each epoch.
            accumulate: batches whose gradients make one step; the same step as one batch of them all.
            micro_batch: samples that go through the model at once, a batch of more being split with the same gradients
                (batch norms apart); auto: half as many whenever memory is full.
            compile: torch.compile for the model, or for the whole step (with the update, if it is a pure one).
            cuda_graph: replay the whole step as one CUDA graph, or what of it can be; auto tries if that is quicker.
            precision: fp32, or autocast to bf16 or fp16 (fp16 with a gradient scaler).
            device: auto (cuda, else mps, else cpu) or a torch device such as cuda:1.
            deterministic: only deterministic algorithms; slower, and an error where torch has none.
            profile: follow 50 early steps: print where their time went, and write a trace into the folder.
            seed: of everything random while training (dropout), and of the order of samples.
            callbacks: called in this order at the events of `callback.py`; transforms of batches are some.
            loggers: get every scalar, text and picture.
            folder: of the run, for callbacks and loggers that write files.

        Raises SettingError for a setting outside its range, and for a device that is not there.
        """
        settings = dict(locals())
        check_arguments(Trainer, settings)
        if max_epochs is None and max_steps is None:
            raise SettingError("a Trainer needs max_epochs or max_steps")
        refused = settings_refused(settings)
        if refused:
            raise SettingError(next(iter(refused.values())))
        super().__init__(device, precision, deterministic, seed, MicroBatches(micro_batch))
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.validate_every = Cadence(validate_every, "validate_every")
        self.log_every = Cadence(log_every, "log_every")
        self.accumulate = accumulate
        self.compile = compile
        self.cuda_graph: CudaGraph = cuda_graph if self.device.type == "cuda" else "off"
        self.profile = profile
        self.folder = check_folder(folder)
        self.callbacks = check_callbacks(callbacks)
        self.loggers = check_loggers(loggers)
        self.state = State()
        self.clock = Clock()
        self.schedule: Callable[[int], float] | None = None
        self.manifest: dict[str, Any] = {}
        self.resumed_from: int | None = None
        self._find_listeners()
        self._was_prepared = False  # for a first fit
        self._last_fit: trainer_state.FitSettings | None = None
        self._record: dict[str, float | Tensor] = {}  # the values of the step that begins
        self._own_names: set[str] = set()  # of the values that the trainer itself logs
        self._open_count = 0  # how many `with trainer:` are open
        self._opened_at: int | None = None  # the step at which the loggers were opened

    def _find_listeners(self) -> None:
        """Find what each event calls, also of callbacks that were added since the last time."""
        check_callbacks(self.callbacks)
        self._listeners = listeners(self.callbacks)
        self.transforms = transforms_of(self.callbacks)

    def fit(
        self,
        model: nn.Module,
        data: Source,
        *,
        task: Task | Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        val: Source | None = None,
        schedule: Callable[[int], float] | None = None,
        metrics: Sequence[Metric] = (),
        batch_size: int = 32,
        resume: dict[str, Any] | None = None,
    ) -> State:
        """Train a model until a limit, or until a callback calls `stop`; return the final state.

        Each call is a fit of its own: it starts at step 0 with the trainer's seed, so that calls in
        a loop read the samples in the same order and draw the same dropout masks (another `seed`
        gives others, `resume` continues). Fit seeds the global generators of Python, NumPy and
        torch, and does not restore them. Callbacks and the schedule start afresh, and existing
        gradients are deleted. The weights, and the state that the optimizer keeps of each
        parameter, stay as they are.

        Only one thread of a process fits at a time, since the generators belong to the process.
        Meanwhile `fit`, `evaluate` and `predict` raise FrameworkError in other threads. In the
        thread that fits, a callback may call them.

        Modules that are in evaluation mode when fit begins, or that a callback puts into it in
        `on_fit_start`, stay in it during training. If the model itself is in evaluation mode, all
        of its modules are trained. Fit leaves all modules in evaluation mode, which another fit
        does not take for a choice: it goes by the modes that were set before this one. To set
        others between two fits, call `model.train()` first, and then `eval()` of single modules.

        Args:
            model: any module; it is moved to the device, and left in evaluation mode.
            data: a `Data` (its val split is validated on), a split, a data set of torch's (also an
                `IterableDataset`, of samples), or an iterable of batches such as a DataLoader,
                which may reuse the memory of its batches. Before each epoch `set_epoch` of the
                loader, its samplers and its data set is called, where there is one.
            task: a `Task`, or a loss of (outputs, targets), which returns their mean (see `LossTask`).
            optimizer: a torch optimizer over the model's parameters.
            val: what to validate on, if not the data's own val split.
            schedule: step -> factor on each group's learning rate. The last factor stays in the
                groups after the fit; a later fit starts from the rates without it, or from those
                that you have set since.
            metrics: measured on training batches and on validation.
            batch_size: for a `Data` or a split; four times as much in validation.
            resume: what `state_dict` gave, to continue from there. A setting of the optimizer's
                groups that differs from the one that the saved fit was started with takes effect;
                all others are restored. The result is that of an uninterrupted fit with a `Data`, a
                split, or batches whose order is fixed for each epoch (a sampler with `set_epoch`).
                With a DataLoader that shuffles by torch's global generator it is so at the end of
                an epoch only, and with one that has a generator of its own never; both warn.

        Raises DataError when the data is empty or does not fit the task, OutOfMemory when memory is full.
        """
        with (
            seeds.fitting(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # whatever the caller has set
            self.prepare_fit(
                model=model,
                data=data,
                task=task,
                optimizer=optimizer,
                val=val,
                schedule=schedule,
                metrics=metrics,
                batch_size=batch_size,
                resume=resume,
            )
            deterministic = deterministic_algorithms(self.deterministic)
            with deterministic, memory_errors(self.device), self.fitting(), torch_errors():
                while not self.done:
                    run_epoch(self)
        return self.state

    def prepare_fit(
        self,
        model: nn.Module,
        data: Source,
        task: Task | Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        val: Source | None,
        schedule: Callable[[int], float] | None,
        metrics: Sequence[Metric],
        batch_size: int,
        resume: dict[str, Any] | None,
    ) -> None:
        """Check and take the arguments of `fit`, and make what its first step needs."""
        metrics = check_metrics(metrics)
        check_fit(model, task, optimizer, schedule)
        needs_targets = not isinstance(task, Task)
        check_source("data", data, needs_targets)
        if val is not None:
            check_source("val", val, needs_targets)
        self._checked_first = False
        check_resume(resume)
        self._use(model, task)
        self.modes = Modes(self.model)
        check_phases(self.task, self.compile, self.cuda_graph)
        check_micro_batches(self.task, self.micro_batches)
        self._find_listeners()
        self.optimizer = optimizer
        self.schedule = schedule
        if isinstance(data, Data):
            check_data(data)
            self.task.check(data)
            val = data.val if val is None else val
            data = data.train
        self.train_batches = self._batches(data, batch_size, shuffle=True)
        self.val_batches = (
            None if val is None else self._batches(val, 4 * batch_size)
        )  # without gradients
        if self.val_batches is not None:
            count_steps(self.val_batches, 1, "validation")
        check_schedule(schedule, self.val_batches is not None)
        self.metrics = metrics
        self._show_targets()
        self._prepare(resume)
        self._check_validation_data()

    def _check_validation_data(self) -> None:
        """Raise DataError where a second validation, perhaps after hours, would find no data."""
        if not isinstance(self.val_batches, ForeignLoader) or not self.val_batches.single_pass:
            return
        by_epochs = self.validate_every.unit == "epoch" and self.max_steps is None
        if self.max_epochs is None or not by_epochs:
            return  # how many validations there will be is not known
        every = int(self.validate_every.number)
        validations = self.max_epochs // every - self.state.epoch // every
        validations += self.max_epochs % every != 0
        if validations > 1:
            kind = type(self.val_batches.batches).__name__
            expected = f"data for {validations} validations"
            raise DataError(f"val: expected {expected}, got a {kind}; {READ_AGAIN}")

    def _show_targets(self) -> None:
        """Give the task all targets, if they are in memory and no transform changes them."""
        loaders = [self.train_batches]
        if self.val_batches is not None:
            loaders.append(self.val_batches)
        self.task.know_targets(None if self.transforms else known_targets(*loaders))

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Run the steps of a fit between its first and its last events."""
        with seeds.fitting(), self:
            try:
                if self._opened_at != self.state.step:  # opened for an earlier fit
                    self._closing.close()
                    self._open_loggers()
                self.modes.train()
                self.emit("fit_start")
                self.modes.keep_choice()
                yield
                self._finish()
                self.emit("fit_end")
                self._flush()
            except BaseException:
                self._emit_exception()
                raise
            finally:
                if self.schedule is not None:
                    mark_learning_rates(self.optimizer)
                self._last_fit = trainer_state.FitSettings(
                    optimizer=self.optimizer,
                    after_fit=group_settings(self.optimizer, self.model),
                    given=self.optimizer_settings,
                )
                self._opened_at = None
                self._training_step.parameters.clear_other_gradients()
                self.clock.finish()
                self.modes.leave()
                self.task.know_targets(None)

    def _prepare(self, resume: dict[str, Any] | None) -> None:
        """Make what the first step needs: counters, scaler, sums, the training step."""
        seeds.seed_everything(seeds.derive(self.seed, "train"))
        stop = None if self._was_prepared else self.state.stop  # by a signal before the first fit
        self.state = State(steps_per_epoch=count_steps(self.train_batches, self.accumulate))
        self.state.stop = stop
        self.state.total_steps = count_total(
            self.state.steps_per_epoch, self.max_epochs, self.max_steps
        )
        self._record = {}
        trainer_state.reset(self)
        start_learning_rates(self.optimizer, self.schedule is not None)
        self.optimizer_settings = trainer_state.given_settings(
            optimizer=self.optimizer,
            model=self.model,
            last_fit=self._last_fit,
        )
        self._own_names = self._names_to_come()
        self.measures = Measures(self.metrics, self.device, self.train_batches.max_buffered)
        self._was_prepared = True
        self.clock = Profiler(self.device, self.folder) if self.profile else Clock()
        self._training_step = self._make_training_step()
        self._single = single_sample(self.train_batches, self.micro_batches.size)
        self.loss = torch.zeros((), device=self.device)
        self.validated_step = -1
        self.at_boundary = True
        self.resumed_from = None
        if resume is not None:
            self.load_state_dict(resume)
            self.resumed_from = self.state.step
            why = other_order(self.train_batches, self.state.batch > 0)
            if why is not None and not self.done:
                said = f"resume: the result differs from that of an uninterrupted fit: {why}"
                warnings.warn(said, stacklevel=4)
        self._rate_from = (time.perf_counter(), self.state.samples)

    def stop(self, by: str, reason: str, signal: Signals | None = None) -> None:
        """End the run after the step under way.

        The first call counts, but a signal always does: the run may go on later.

        Args:
            by: the name of the callback that ends it, such as "early_stop".
            reason: a text for people.
            signal: the signal that ends it, if it is one.
        """
        if self.state.stop is None or signal is not None:
            self.state.stop = Stop(by, reason, signal)

    def _make_training_step(self) -> TrainingStep:
        parameters = Parameters(self.model, self.optimizer)
        callbacks = GradientCallbacks(gradient_callbacks(self.callbacks), self)
        forward_backward = select_step(
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            parameters=parameters,
            precision=self.precision,
            micro_batches=self.micro_batches,
            clock=self.clock,
            compile=self.compile,
            cuda_graph=self.cuda_graph,
            callbacks=callbacks,
            call_recordable=partial(self._call_recordable, callbacks),
        )
        return TrainingStep(
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            device=self.device,
            precision=self.precision,
            micro_batches=self.micro_batches,
            measures=self.measures,
            clock=self.clock,
            parameters=parameters,
            forward_backward=forward_backward,
            update=select_update(self.optimizer, self.precision),
        )

    def _call_recordable(self, callbacks: GradientCallbacks, loss: Tensor) -> None:
        """Let callbacks see the gradients of a step that a CUDA graph records."""
        self.loss = loss
        for callback in callbacks.recordable():
            callback.on_gradients(self)

    @property
    def done(self) -> bool:
        """Whether a limit is reached, or the run was stopped."""
        return self.state.stop is not None or self.at_limit

    @property
    def at_limit(self) -> bool:
        """Whether `max_steps` or `max_epochs` is reached."""
        out_of_steps = self.max_steps is not None and self.state.step >= self.max_steps
        return out_of_steps or (self.max_epochs is not None and self.state.epoch >= self.max_epochs)

    def start_epoch(self) -> None:
        """Put the model into training mode, and emit `epoch_start` if an epoch begins."""
        self.modes.train()
        if self.state.batch == 0:
            self.emit("epoch_start")
            self.modes.keep_training()

    def windows(self) -> Iterator[tuple[list[Batch], bool]]:
        """Yield the batches of each step left in the epoch, and whether it is the last step.

        Raises DataError if the data ends before the last step.
        """
        state = self.state
        batches = self.train_batches.epoch(state.epoch, state.batch)
        if self._single is not None:
            batches = self._try_single_sample(batches)
        steps_left = 0
        if state.steps_per_epoch:
            steps_left = state.steps_per_epoch - state.batch // self.accumulate
        waited = time.perf_counter()
        for window in steps(batches, self.accumulate, steps_left, self.train_batches.keep):
            self.clock.add("waiting for data", time.perf_counter() - waited)
            yield window
            waited = time.perf_counter()
        expected = "can it be read only once?"
        if steps_left:
            expected = f"its length says {len(self.train_batches)}"
        ended = f"epoch {state.epoch + 1} of the training data ended after {state.batch} batches"
        raise DataError(f"{ended}; {expected}")

    def _try_single_sample(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches; before the first of a fit, try one sample, as a batch to come is one."""
        for batch in batches:
            if self._single is not None:
                placed = move_batch(batch, self.device)
                check_single_sample(self.model, self.task, placed, self.precision, self._single)
                self._single = None
            yield batch

    def train_step(self, window: Sequence[Batch]) -> None:
        """Make one step of the optimizer (see `step.py`)."""
        self._check_parts()
        self.at_boundary = False
        self._training_step(self, window)

    def _check_parts(self) -> None:
        """Raise SettingError when a callback has replaced a part that this fit was prepared for."""
        prepared = self._training_step
        same = self.model is prepared.model and self.task is prepared.task
        if same and self.optimizer is prepared.optimizer:
            return
        for name in ("model", "task", "optimizer"):
            if getattr(self, name) is not getattr(prepared, name):
                advice = "change it in place, or start a new fit"
                raise SettingError(f"trainer.{name} was replaced during fit: {advice}")

    def count_step(self, window: Sequence[Batch], last: bool) -> None:
        """Count a step that is done."""
        state = self.state
        state.step += 1
        state.batch += len(window)
        state.samples += sum([len(batch[0]) for batch in window])
        if last:
            state.epoch += 1
            state.batch = 0

    def finish_step(self, last: bool) -> None:
        """Emit the events that end a step, and hand its values to the loggers."""
        self.emit("step_end")
        if last:
            self.emit("epoch_end")
        self._flush()
        self.emit("step_done")
        self.clock.step()
        self.at_boundary = True

    def sample_indices(self) -> list[int] | None:
        """Return which samples of the training split the step under way reads; None for batches of your own."""
        if not isinstance(self.train_batches, Loader):
            return None
        return self.train_batches.indices(self.state.epoch, self.state.batch, self.accumulate)

    def log_if_due(self, last: bool) -> None:
        """Log at the cadence, at the end of an epoch, and after the last step of the run."""
        if last or self.at_limit or self.log_every.due(self.state, epoch_end=last):
            self.log_training()

    def log_training(self) -> None:
        """Read the training sums since the last time, and give them to the callbacks and loggers."""
        now = time.perf_counter()
        samples = self.state.samples
        since, before = self._rate_from
        self._rate_from = (now, samples)
        values = {f"train/{name}": value for name, value in self.measures.read().items()}
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]
        if rates:
            values["train/learning_rate"] = max(rates)
        values["train/samples_per_second"] = (samples - before) / max(now - since, 1e-9)
        self._log_own(values)
        self.emit("log")
        self._flush()

    def validate_if_due(self, last: bool) -> None:
        """Validate at the cadence, and after the last step of the run."""
        if self.validation_is_due(last):
            self._validate()

    def validation_is_due(self, last: bool) -> bool:
        """Return whether to validate after this step; a cadence in minutes counts from here on."""
        if self.val_batches is None:
            return False
        return self.at_limit or self.validate_every.due(self.state, epoch_end=last)

    def _validate(self) -> None:
        """Measure the validation split; training's randomness is not touched."""
        assert self.val_batches is not None
        self.emit("validation_start")
        began = time.perf_counter()
        with self.clock.part("validation"):
            values = self._measure(self.val_batches)
        self.record_validation(values, time.perf_counter() - began)

    def record_validation(self, values: dict[str, float], seconds: float) -> None:
        """Log the values of a validation, and tell the schedule and the callbacks."""
        self.validated_step = self.state.step
        self._log_own({f"val/{name}": value for name, value in values.items()})
        if isinstance(self.schedule, Schedule):
            self.schedule.observe(self.state.metrics)  # type: ignore[arg-type]
        self.emit("validation_end")
        self._flush()
        self._rate_from = (self._rate_from[0] + seconds, self._rate_from[1])

    def _finish(self) -> None:
        """Log and validate once more after the last step if needed.

        Not after a signal: the run may go on, and another measurement would change its numbers.
        """
        stop = self.state.stop
        if stop is not None and stop.signal is not None:
            return
        self.at_boundary = (
            False  # or a run that fails here would go on without what is not logged yet
        )
        if not self.measures.empty:
            self.log_training()
        if self.val_batches is not None and self.validated_step != self.state.step:
            self._validate()
        self.at_boundary = True

    def _report(self, values: dict[str, float]) -> None:
        self._log_own(values)
        self._flush()

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Add values to the record of this step; loggers get the whole record at once.

        Args:
            values: by tag; numbers, or tensors with one number, read when the step is done.

        Raises SettingError for a value that is no number, and for a tag that is no text. A tag by
        which the trainer logs a value of its own gives a warning.
        """
        self._add(checked_record(values, self._own_names))

    def _names_to_come(self) -> set[str]:
        """Return the names by which the trainer will log values of its own."""
        measured = ["loss", *(metric.name for metric in self.metrics)]
        names = {f"train/{name}" for name in [*measured, "learning_rate", "samples_per_second"]}
        if self.val_batches is not None:
            names |= {f"val/{name}" for name in measured}
        return names

    def _log_own(self, values: Mapping[str, float]) -> None:
        """Add values of the trainer itself."""
        self._own_names.update(values)
        self._add(values)

    def _add(self, values: Mapping[str, float | Tensor]) -> None:
        self._record.update(values)
        self.state.metrics.update(
            {name: v for name, v in values.items() if not isinstance(v, Tensor)}
        )

    def _flush(self) -> None:
        """Hand the record of this step to the loggers."""
        if not self._record:
            return
        values = {name: float(value) for name, value in self._record.items()}
        self._record = {}
        self.state.metrics.update(values)
        if self._open_count:
            state = self.state
            with self.clock.part("logging"), disk_errors(self.folder):
                for logger in self.loggers:
                    logger.scalars(
                        values, step=state.step, epoch=state.epoch, wall_seconds=state.wall_seconds
                    )

    def capture(self) -> dict[str, Any]:
        """Return what `state_dict` returns without copies: the next step changes the tensors."""
        return trainer_state.capture(self)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on from here, in plain types and tensors.

        The tensors are copies on their devices: the state stays as it is while training goes on.
        """
        return copy.deepcopy(self.capture())

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        trainer_state.restore(self, saved)

    def __enter__(self) -> "Trainer":
        """Keep loggers open until the end of the `with`, so that `evaluate` after `fit` is logged too."""
        if self._open_count == 0:
            self._open_loggers()
        self._open_count += 1
        return self

    def _open_loggers(self) -> None:
        names = ["loss", *(metric.name for metric in self.metrics)]
        if "run" in self.manifest and self.folder is not None:  # whoever claimed it has made it
            check_exists(self.folder)
        with ExitStack() as opened, disk_errors(self.folder):
            for logger in self.loggers:
                opened.callback(logger.close)
                logger.open(self.folder, self.state.step, names)
            self._closing = opened.pop_all()  # an error in one still closes the others
        self._opened_at = self.state.step

    def __exit__(self, *_: object) -> None:
        self._open_count -= 1
        if self._open_count == 0:
            with self._closing:
                self.emit("close")

    def _emit_exception(self) -> None:
        """Tell callbacks that the fit fails; an error of theirs does not hide what it fails of."""
        for listener in self._listeners["exception"]:
            try:
                listener(self)
            except Exception as error:
                said = f"on_exception of a callback fails too: {describe(error)}"
                warnings.warn(said, stacklevel=2)

    def emit(self, event: str) -> None:
        """Call the callbacks that listen to an event."""
        if self._listeners[event]:
            with self.clock.detail("callbacks"):
                try:
                    for listener in self._listeners[event]:
                        listener(self)
                except OSError as error:
                    check_disk_error(error, self.folder)
                    raise
