"""The Trainer, which trains with objects. It knows no registered names and no config.

    trainer = Trainer(max_epochs=10)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer.fit(model, loader, task=nn.CrossEntropyLoss(), optimizer=optimizer)

`loop.py` is the loop and `step.py` the training step; `contracts/callback.py` lists the events.
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
from framework.contracts.direction import metric_directions
from framework.contracts.history import History
from framework.contracts.logger import Logger
from framework.contracts.metric import Metric
from framework.contracts.schedule import Schedule
from framework.contracts.state import Cadence, Every, State, Stop
from framework.contracts.strategy import Strategy
from framework.contracts.task import Task
from framework.contracts.transform import transforms_of
from framework.data.accumulation import (
    Batches,
    Source,
    count_steps,
    count_total,
    known_targets,
    other_order,
    step_windows,
    training_epoch,
)
from framework.data.dataset import READ_AGAIN, Batch, Data, ForeignLoader, Loader, check_data
from framework.errors import DataError, SettingError, short
from framework.errors.torch_errors import torch_errors
from framework.errors.user_code import describe
from framework.registry.annotations import PositiveInt
from framework.registry.schema import check_arguments
from framework.runtime import seeds
from framework.runtime.batch import count_rows, move_batch
from framework.runtime.clock import CURRENT_CLOCK, WAITING_FOR_DATA, Clock, Profiler
from framework.runtime.determinism import deterministic_algorithms
from framework.runtime.dtensors import has_dtensors
from framework.runtime.memory import MicroBatches, memory_errors
from framework.runtime.memory_format import ChannelsLast
from framework.runtime.modes import Modes
from framework.runtime.precision import Format
from framework.runtime.processes import broken_connections
from framework.system.files import check_disk_error, check_exists, disk_errors

from . import trainer_state
from .acceleration.callbacks import GradientCallbacks, gradient_callbacks
from .acceleration.compile_choice import CompileChoice, StepKind
from .acceleration.compiled_step import Compile
from .acceleration.cuda_graph import CudaGraph
from .acceleration.fused_selection import FusedSelection
from .agreement import agreed_stop, compared, same_time, share_generators
from .evaluator import Evaluator
from .log_record import checked_record
from .loop import run_epoch
from .optimizer_state import (
    group_settings,
    mark_learning_rates,
    match_layout,
    start_learning_rates,
)
from .parameters import ModelParameters
from .process_times import PROCESS_SCALARS, ProcessClock, ProcessTimes
from .sharded_step import ShardedStep
from .shards import slice_of
from .single_sample import check_single_sample, single_sample
from .step import TrainingStep, select_step, select_update
from .validation import (
    check_callbacks,
    check_channels_last,
    check_dtensor_callbacks,
    check_fit,
    check_folder,
    check_loggers,
    check_metrics,
    check_micro_batches,
    check_phases,
    check_resume,
    check_rows,
    check_schedule,
    check_shards,
    check_source,
    check_strategy,
    settings_refused,
)


class Trainer(Evaluator):
    """Trains a model on some data with a task and an optimizer, evaluates it and predicts with it.

    It implements `Context` for callbacks, and `Run` for the loop.

    Attributes:
        state: counters and the last value of each logged scalar.
        at_boundary: no step is in progress, so that a run resumed from `state_dict` is exact.
        resumed_from: the step that `fit` resumed from, or None.
        manifest: facts of the run that its checkpoints store.
        clock: the time spent in parts of `fit`.
        process_times: the time of each process in the last fit; None with a single process.
    """

    def __init__(  # noqa: PLR0913  # the settings of a run
        self,
        max_epochs: PositiveInt | None = None,
        max_steps: PositiveInt | None = None,
        validate_every: Every = "1epoch",
        log_every: Every = "50steps",
        accumulate: PositiveInt = 1,
        micro_batch: PositiveInt | Literal["auto"] | None = None,
        compile: Compile = "off",  # noqa: A002  # as torch.compile
        cuda_graph: CudaGraph = "off",
        precision: Format = "fp32",
        device: str = "auto",
        deterministic: bool = False,
        profile: bool = False,
        fused: bool = True,
        devices: PositiveInt | None = None,
        shards: PositiveInt | None = None,
        *,
        seed: int = 0,
        strategy: Strategy | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
        folder: Path | None = None,
    ):
        """Set the limits and the settings of a run.

        Args:
            max_epochs: maximum number of passes over the training data.
            max_steps: maximum number of optimizer steps; the run ends at the first limit reached.
            validate_every: when the validation split is measured; also after the last step.
            log_every: when training values are read from the device and logged; also after each
                epoch.
            accumulate: batches whose gradients make one step, equal to one batch of all of them.
            micro_batch: samples that the model processes at once; larger batches are split, with
                the same gradients (except for batch norms). auto: halved whenever memory is full.
            compile: torch.compile for the model, or for the step (with the update of a pure
                optimizer); auto: for the step, if measurements in the first steps show that it is
                faster. Its results differ by rounding, so two runs with auto may differ.
            cuda_graph: replay the step as a CUDA graph, with the update if possible; auto: only if
                that is faster.
            precision: fp32, or autocast to bf16 or fp16 (fp16 with a gradient scaler).
            device: auto (cuda, else mps, else cpu) or a torch device such as cuda:1.
            deterministic: use deterministic algorithms only; slower, and an error where torch has
                none.
            profile: profile 50 early steps, print the time of their parts, and write a trace into
                the folder.
            fused: use the fused kernel of torch, if there is one, for an optimizer that was built
                with neither `fused` nor `foreach`. It has the same state and formula; results
                differ by rounding.
            devices: number of processes that share the run, each with a device of its own or some
                threads. `framework train` starts them; other programs are started with torchrun.
            shards: a power of two: cut each batch into as many parts, which are computed one by one
                and summed in fixed order. So the weights, the losses and the metrics are the same,
                bit for bit, on 1, 2, 4, ... processes, up to the number of shards, on the same kind
                of machine with the same number of threads for an operation (OMP_NUM_THREADS). On
                one process, a step of a small MLP with 8 shards takes about 15 times the CPU time.
                Batch norms normalize over a shard. Random numbers depend on (seed, step, shard).
            seed: of the order of samples and all other random numbers in training.
            strategy: how the processes of the run share its work, such as
                `fw.strategies.build("ddp")`; by default there is one process.
            callbacks: called in this order at each event; includes transforms of batches.
            loggers: receive each scalar, text and image.
            folder: the folder of the run, for callbacks and loggers that write files.

        Raises:
            SettingError: a setting is outside its range, or the device does not exist.
        """
        settings = dict(locals())
        check_arguments(Trainer, settings)
        if max_epochs is None and max_steps is None:
            raise SettingError("a Trainer needs max_epochs or max_steps")
        for name, reason in settings_refused(settings).items():
            raise SettingError(f"{name}={short(settings[name], quote=False)}: {reason}")
        super().__init__(
            device, precision, deterministic, seed, MicroBatches(micro_batch), strategy, shards
        )
        check_strategy(self.strategy, strategy is None, settings)
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.validate_every = Cadence(validate_every, "validate_every")
        self.log_every = Cadence(log_every, "log_every")
        self.accumulate = accumulate
        self.compile = compile
        self.compile_choice = CompileChoice()
        self.cuda_graph: CudaGraph = cuda_graph if self.device.type == "cuda" else "off"
        self.profile = profile
        self.fused = fused
        self.folder = check_folder(folder)
        self.callbacks = check_callbacks(callbacks)
        self.loggers = check_loggers(loggers) if self.strategy.is_main else []
        self.state = State()
        self.clock = Clock()
        self.process_times: ProcessTimes | None = None
        self.schedule: Callable[[int], float] | None = None
        self.manifest: dict[str, Any] = {}
        self.resumed_from: int | None = None
        self._find_listeners()
        self._was_prepared = False  # for a first fit
        self._last_fit: trainer_state.FitSettings | None = None
        self._fused: FusedSelection | None = None
        self._record: dict[str, float | Tensor] = {}  # the logged values of the current step
        self._own_tags: set[str] = set()  # of the values that the trainer itself logs
        self._stop_request: Stop | None = None  # of this process, in a run of several
        self._open_count = 0  # the number of `with trainer:` blocks that are open
        self._opened_at: int | None = None  # the step at which the loggers were opened

    def fit(  # noqa: PLR0913  # the objects of a fit
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
        channels_last: ChannelsLast = False,
        resume: dict[str, Any] | None = None,
    ) -> State:
        """Train a model until a limit is reached or a callback calls `stop`.

        Each call is a new fit: it starts at step 0 with the trainer's seed, so that calls in a loop
        read the samples in the same order and draw the same dropout masks (unless `seed` changes,
        or `resume` continues an earlier fit). Fit seeds the global generators of Python, NumPy and
        torch, and does not restore them. Callbacks and the schedule are reset, and existing
        gradients are deleted. The weights, and the state of the optimizer for each parameter, are
        kept.

        Only one thread of a process can fit at a time, since the generators belong to the process.
        Meanwhile `fit`, `evaluate` and `predict` raise FrameworkError in other threads. In the
        thread that fits, a callback may call them.

        Modules that are in evaluation mode when fit begins, or that a callback puts into it in
        `on_fit_start`, stay in it during training. If the model itself is in evaluation mode, all
        of its modules are trained. Fit leaves all modules in evaluation mode; the next fit uses the
        modes that were set before this one. To set others between two fits, call `model.train()`
        first, and then `eval()` of single modules.

        Args:
            model: any module; it is moved to the device, and left in evaluation mode.
            data: a `Data` (with its val split for validation), a split, a dataset of torch
                (also an `IterableDataset` of samples), or an iterable of batches such as a
                DataLoader, which may reuse the memory of its batches. Before each epoch,
                `set_epoch` of the loader, its samplers and its dataset is called if it exists.
            task: a `Task`, or a loss of (outputs, targets) that returns their mean (see
                `LossTask`).
            optimizer: an optimizer over the parameters of the model.
            val: data for validation instead of the val split of the data.
            schedule: maps a step to a factor on the learning rate of each group. The last factor
                stays in the groups after the fit; a later fit starts from the rates without it, or
                from rates that were set since.
            metrics: measured on training batches and in validation.
            batch_size: samples in a batch, for a `Data` or a split; four times as many in
                validation.
            channels_last: convert images to the memory format channels last, in which most
                convolutional models are faster; auto: if the model is expected to be. Numbers
                differ by rounding. A model that calls `view` on the output of a convolution needs
                `reshape` or `flatten` instead. A `Loader` has a setting of its own.
            resume: a result of `state_dict`, to continue that fit. A setting of the optimizer's
                groups that differs from the one that the saved fit started with takes effect; all
                others are restored. The result equals that of an uninterrupted fit with a `Data`, a
                split, or batches whose order is fixed for each epoch (a sampler with `set_epoch`).
                With a DataLoader that shuffles by torch's global generator this holds only at the
                end of an epoch, and with one that has its own generator never; both give a warning.
                An iterable with `state_dict` and `load_state_dict`, such as torchdata's
                StatefulDataLoader, continues from its saved state, and as exactly as that allows.

        Returns:
            The final state; `state.history` has all values that were logged.

        Raises:
            DataError: the data is empty or does not fit the task.
            OutOfMemory: memory is full.
            SettingError: an argument is not valid.
        """
        # Gradients are needed, even if the caller has disabled them.
        own_time = same_time(self.strategy)
        with seeds.fitting(), torch.inference_mode(False), torch.enable_grad(), own_time:
            try:
                self.prepare_fit(
                    model=model,
                    data=data,
                    task=task,
                    optimizer=optimizer,
                    val=val,
                    schedule=schedule,
                    metrics=metrics,
                    batch_size=batch_size,
                    channels_last=channels_last,
                    resume=resume,
                )
                deterministic = deterministic_algorithms(self.deterministic)
                with deterministic, memory_errors(self.device), self.fitting(), torch_errors():
                    while not self.done:
                        run_epoch(self)
            finally:
                if self._fused is not None:
                    self._fused.release()
        return self.state

    def stop(self, by: str, reason: str, signal: Signals | None = None) -> None:
        """End the run after the current step.

        Of several calls the first one counts, except that a signal always replaces the reason,
        since the run may then be resumed.

        Args:
            by: the name of the callback that ends the run, such as "early_stop".
            reason: a text for the user.
            signal: the signal that ends the run, or None.
        """
        stop = Stop(by, reason, signal)
        if self.strategy.world_size > 1:  # all processes must end after the same step
            if self._stop_request is None or signal is not None:
                self._stop_request = stop
        elif self.state.stop is None or signal is not None:
            self.state.stop = stop

    @property
    def stopping(self) -> bool:
        """Whether this process has a reason to end the run; the others may not know it yet."""
        return self.state.stop is not None or self._stop_request is not None

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Add values to the record of the current step, which the loggers receive as one.

        Args:
            values: numbers by tag. Tensors must have one element; they are read when the step is
                done. A tag of the trainer's own values gives a warning.

        Raises:
            SettingError: a value is not a number, or a tag is not a text.
        """
        self._add(checked_record(values, self._own_tags))

    def sample_indices(self) -> list[int] | None:
        """Return the indices of the samples of the training split that the current step reads.

        None if the training data is not a split.
        """
        if not isinstance(self.train_batches, Loader):
            return None
        return self.train_batches.indices(self.state.epoch, self.state.batch, self.accumulate)

    def capture(self) -> dict[str, Any]:
        """Return the result of `state_dict` without copies: the next step changes the tensors.

        Tensors may be sharded (see `Strategy.full`).
        """
        return trainer_state.capture(self)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `fit(resume=...)` needs, as plain types and tensors.

        The tensors are copies on their devices: the state does not change as training continues.
        """
        return copy.deepcopy(self.strategy.full(self.capture(), everywhere=True))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a result of `state_dict` or `capture`."""
        trainer_state.restore(self, saved)

    def __enter__(self) -> "Trainer":
        """Keep the loggers open until the end of the block, so that they record `evaluate` too."""
        if self._open_count == 0:
            self._open_loggers()
        self._open_count += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._open_count -= 1
        if self._open_count == 0:
            with self._closing:
                self.emit("close")

    # the start and the end of a fit

    def prepare_fit(  # noqa: PLR0913  # the arguments of `fit`
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
        channels_last: ChannelsLast = False,
    ) -> None:
        """Check the arguments of `fit`, and create everything that the first step needs."""
        metrics = check_metrics(metrics)
        check_fit(model, task, optimizer, schedule)
        needs_targets = not isinstance(task, Task)
        check_channels_last(channels_last)
        check_source("data", data, needs_targets)
        if val is not None:
            check_source("val", val, needs_targets)
        self._checked_first = False
        check_resume(resume)
        self._use(model, task)
        self.modes = Modes(self.model)
        check_phases(self.task, self.compile, self.cuda_graph)
        check_micro_batches(self.task, self.micro_batches)
        check_shards(self.task, self.shards)
        self._find_listeners()
        self.optimizer = optimizer
        self.schedule = schedule
        if isinstance(data, Data):
            check_data(data)
            self.task.check(data)
            val = data.val if val is None else val
            data = data.train
        self.train_batches = self._batches(
            data, batch_size, shuffle=True, channels_last=channels_last
        )
        self.val_batches = None
        if val is not None:
            eval_batch_size = 4 * batch_size  # no gradients need memory
            self.val_batches = self._batches(val, eval_batch_size, channels_last=channels_last)
            count_steps(self.val_batches, 1, "validation")
        check_schedule(schedule, self.val_batches is not None)
        self.metrics = metrics
        self._share_targets()
        self._prepare(resume)

    def _find_listeners(self) -> None:
        """Find the methods of all callbacks, including those that were added since the last fit."""
        check_callbacks(self.callbacks)
        self._listeners = listeners(self.callbacks, self.strategy.is_main)
        self.transforms = transforms_of(self.callbacks)

    def _share_targets(self) -> None:
        """Give the task all targets if they are in memory and no transform changes them."""
        loaders = [self.train_batches]
        if self.val_batches is not None:
            loaders.append(self.val_batches)
        targets = None
        if not self.transforms:
            targets = known_targets(self.task.fields.known_targets, *loaders)
        self.task.know_targets(targets)

    def _prepare(self, resume: dict[str, Any] | None) -> None:
        """Create what the first step needs: counters, scaler, sums, the training step."""
        seeds.seed_everything(seeds.derive(self.seed, "train"))
        stop = None if self._was_prepared else self.state.stop  # by a signal before the first fit
        self.state = State(
            steps_per_epoch=count_steps(self.train_batches, self.accumulate),
            reading=self.train_batches.description,
            history=History(metric_directions(self.metrics)),
        )
        self.state.stop = stop
        self.state.total_steps = count_total(
            self.state.steps_per_epoch, self.max_epochs, self.max_steps
        )
        if self._was_prepared:
            self._stop_request = None
        self._record = {}
        trainer_state.reset(self)
        start_learning_rates(self.optimizer, self.schedule is not None)
        self.optimizer_settings = trainer_state.user_settings(
            optimizer=self.optimizer,
            model=self.model,
            last_fit=self._last_fit,
        )
        self._own_tags = self._expected_tags()
        self.measures = self._new_measures(self.train_batches)
        self._was_prepared = True
        profiles = self.profile and self.strategy.is_main
        self.clock = Profiler(self.device, self.folder) if profiles else Clock()
        self._single = single_sample(
            self.train_batches, self.micro_batches.size, self.shards, self.strategy.world_size
        )
        self.process_times = None
        self.loss = torch.zeros((), device=self.device)
        self.batches: Sequence[Batch] = ()
        self.validated_step = -1
        self.at_boundary = True
        self.resumed_from = None
        self.strategy.prepare(self.model, self.optimizer, in_shards=self.shards is not None)
        try:
            self._prepare_shared(resume)
        except BaseException:
            self.strategy.finish(self.model)
            raise

    def _prepare_shared(self, resume: dict[str, Any] | None) -> None:
        """Do the rest of `_prepare`, after the processes have the same weights."""
        if self.strategy.forward_is_collective:
            self._single = None  # `check_rows` refuses a batch of one sample
        if has_dtensors(self.model):
            check_dtensor_callbacks(self.callbacks)
        check_rows(self.strategy, self.train_batches, self.micro_batches, self.task, self.shards)
        if resume is not None:
            self.load_state_dict(resume)
            self.resumed_from = self.state.step
            reason = other_order(self.train_batches, self.state.batch > 0)
            if reason is not None and not self.done:
                warnings.warn(
                    f"resume: the result differs from that of an uninterrupted fit: {reason}",
                    stacklevel=5,
                )
        self._check_validation_data()
        self._choose_fused()
        self._training_step = self._make_training_step()
        self._speed_since = (time.perf_counter(), self.state.samples)

    def _choose_fused(self) -> None:
        """Select the fused kernel, after the saved state of the optimizer is loaded."""
        match_layout(self.optimizer)  # the user may have changed the memory format of the model
        self._fused = FusedSelection(self.optimizer, self.optimizer_settings, self.fused)

    def _make_training_step(self) -> TrainingStep:
        parameters = ModelParameters(self.model, self.optimizer)
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
            compile_choice=self.compile_choice,
            cuda_graph=self.cuda_graph,
            callbacks=callbacks,
            call_recordable=partial(self._call_recordable, callbacks),
            strategy=self.strategy,
        )
        arguments: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            "optimizer": self.optimizer,
            "device": self.device,
            "precision": self.precision,
            "micro_batches": self.micro_batches,
            "measures": self.measures,
            "clock": self.clock,
            "parameters": parameters,
            "forward_backward": forward_backward,
            "update": select_update(self.optimizer, self.precision),
            "strategy": self.strategy,
        }
        if self.shards is not None:
            return ShardedStep(**arguments, slice=slice_of(self.strategy, self.shards))
        return TrainingStep(**arguments)

    def _call_recordable(self, callbacks: GradientCallbacks, loss: Tensor) -> None:
        """Call the recordable callbacks while a CUDA graph records their operations."""
        self.loss = loss
        for callback in callbacks.recorded():
            callback.on_gradients(self)

    def _check_validation_data(self) -> None:
        """Raise DataError if a second validation, maybe hours later, would find no data."""
        if not isinstance(self.val_batches, ForeignLoader) or not self.val_batches.single_pass:
            return
        by_epochs = self.validate_every.unit == "epoch" and self.max_steps is None
        if self.max_epochs is None or not by_epochs:
            return  # the number of validations is not known
        every = int(self.validate_every.number)
        validations = self.max_epochs // every - self.state.epoch // every
        validations += self.max_epochs % every != 0
        if validations > 1:
            kind = type(self.val_batches.batches).__name__
            raise DataError(
                f"val: expected data for {validations} validations, got a {kind}; {READ_AGAIN}"
            )

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Run the steps of a fit in a block, between its first and its last events."""
        with seeds.fitting(), self, CURRENT_CLOCK.set(self.clock):
            self._process_clock = ProcessClock(self.strategy, self.clock)
            try:
                if self._opened_at != self.state.step:  # opened for an earlier fit
                    self._closing.close()
                    self._open_loggers()
                self.modes.train()
                self.emit("fit_start")
                self.modes.keep_choice()
                if self.strategy.world_size > 1:
                    self._agree_on_stop()
                yield
                self._finish()
                if self.strategy.world_size > 1:
                    self.process_times = self._process_clock.total()
                self.emit("train_end")
                self.emit("fit_end")
                self._flush()
            except BaseException:
                self._emit_exception()
                raise
            finally:
                self._clean_up()

    def _finish(self) -> None:
        """Log and validate once more after the last step if needed.

        Not after a signal: the run may be resumed, and another measurement would change its values.
        """
        if self.state.interrupted:
            return
        # If this fails, no checkpoint may be saved: the resumed run would lack these values.
        self.at_boundary = False
        if not self.measures.agreed_empty():
            self.log_training()
        if self.val_batches is not None and self.validated_step != self.state.step:
            self._validate(self.val_batches)
        self.at_boundary = True

    def _clean_up(self) -> None:
        """Leave the model, optimizer and task as the next fit expects them."""
        if self.schedule is not None:
            mark_learning_rates(self.optimizer)
        if self._fused is not None:
            self._fused.release()
        self._last_fit = trainer_state.FitSettings(
            optimizer=self.optimizer,
            after_fit=group_settings(self.optimizer, self.model),
            by_user=self.optimizer_settings,
        )
        self._opened_at = None
        self._training_step.parameters.clear_other_gradients()
        self.strategy.finish(self.model)
        self.clock.finish()
        self.modes.leave()
        self.task.know_targets(None)

    # the methods that the loop calls (see `loop.py`)

    @property
    def done(self) -> bool:
        """Whether a limit is reached, or the run was stopped."""
        return self.state.stop is not None or self.at_limit

    @property
    def step_kind(self) -> StepKind | None:
        """The kind of steps that `compile=auto` has kept; None if it has kept none."""
        return self.compile_choice.kind if self.compile == "auto" else None

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
        """Yield the batches of each remaining step of the epoch, and whether it is the last step.

        Raises:
            DataError: the data ends before the last step.
        """
        state = self.state
        loader = self.train_batches
        share_generators(self.strategy, loader)
        batches = training_epoch(loader, state.epoch, state.batch, self.accumulate)
        if self.strategy.world_size > 1:
            batches = compared(self.strategy, loader, batches)
        if self._single is not None:
            batches = self._try_single_sample(batches)
        steps_left = 0
        if state.steps_per_epoch:
            steps_left = state.steps_per_epoch - state.batch // self.accumulate
        keep = self.train_batches.keep
        began = time.perf_counter()
        for window, last in step_windows(batches, self.accumulate, steps_left, keep):
            self.clock.add(WAITING_FOR_DATA, time.perf_counter() - began)
            yield window, last
            began = time.perf_counter()
        # The loop stops reading after the last step, so that the data has ended too early.
        cause = "can it be read only once?"
        if steps_left:
            cause = f"its length says {len(self.train_batches)}"
        raise DataError(
            f"epoch {state.epoch + 1} of the training data ended after {state.batch} batches; "
            f"{cause}"
        )

    def _try_single_sample(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches; check the first one of a fit as if it had a single sample."""
        for batch in batches:
            if self._single is not None:
                placed = move_batch(batch, self.device)
                check_single_sample(self.model, self.task, placed, self.precision, self._single)
                self._single = None
            yield batch

    def train_step(self, window: Sequence[Batch]) -> None:
        """Run one optimizer step (see `step.py`)."""
        self._check_parts()
        self.at_boundary = False
        if self.strategy.world_size == 1:
            self._training_step(self, window)
            return
        with broken_connections():
            self._training_step(self, window)

    def _check_parts(self) -> None:
        """Raise SettingError if a callback has replaced a part that the fit was prepared for."""
        prepared = self._training_step
        same = self.model is prepared.model and self.task is prepared.task
        if same and self.optimizer is prepared.optimizer:
            return
        for name in ("model", "task", "optimizer"):
            if getattr(self, name) is not getattr(prepared, name):
                raise SettingError(
                    f"trainer.{name} was replaced during fit: "
                    "change it in place, or start a new fit"
                )

    def count_step(self, window: Sequence[Batch], last: bool) -> None:
        """Update the counters after a step."""
        state = self.state
        state.step += 1
        state.batch += len(window)
        totals = self._training_step.totals
        if totals is None:
            state.samples += sum([count_rows(batch) for batch in window])
        else:
            state.samples += totals.samples
        if last:
            state.epoch += 1
            state.batch = 0

    def log_if_due(self, last: bool) -> None:
        """Log at the cadence, after the last step of an epoch, and after that of the run."""
        if last or self.at_limit or self.log_every.due(self.state, epoch_end=last):
            self.log_training()

    def validate_if_due(self, last: bool) -> None:
        """Validate at the cadence, and after the last step of the run."""
        if self.val_batches is not None and self.validation_is_due(last):
            self._validate(self.val_batches)

    def validation_is_due(self, last: bool) -> bool:
        """Return whether to validate after this step. Call it once: it restarts a time cadence."""
        if self.val_batches is None:
            return False
        return self.at_limit or self.validate_every.due(self.state, epoch_end=last)

    def finish_step(self, last: bool) -> None:
        """Emit the last events of a step, and pass its values to the loggers."""
        self.emit("step_end")
        if last:
            self.emit("epoch_end")
        self._flush()
        self.emit("step_done")
        self.clock.step()
        if self.strategy.world_size > 1:
            self._agree_on_stop()
        self.at_boundary = True

    def _agree_on_stop(self) -> None:
        """End all processes before the next step if one of them has to end (collective)."""
        request = self._stop_request or self.state.stop
        self.state.stop = agreed_stop(self.strategy, request)

    # logging, validation and events

    def log_training(self) -> None:
        """Read the sums of training, and log their means, the learning rate and the speed."""
        now = time.perf_counter()
        samples = self.state.samples
        began, samples_before = self._speed_since
        self._speed_since = (now, samples)
        values = {f"train/{name}": value for name, value in self.measures.read().items()}
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]
        if rates:
            values["train/learning_rate"] = max(rates)
        seconds = max(now - began, 1e-9)
        values["train/samples_per_second"] = (samples - samples_before) / seconds
        if self.strategy.world_size > 1:
            times = self._process_clock.since_last_call()
            values |= {f"train/{name}": value for name, value in times.scalars().items()}
        self._log_own(values)
        self.emit("log")
        self._flush()

    def _validate(self, batches: Batches) -> None:
        """Measure the validation data, without an effect on the random numbers of training."""
        self.emit("validation_start")
        began = time.perf_counter()
        with self.clock.part("validation"):
            values = self._measure(batches)
        self.record_validation(values, time.perf_counter() - began)

    def record_validation(self, values: dict[str, float], seconds: float) -> None:
        """Log the values of a validation, and pass them to the schedule and the callbacks.

        Args:
            values: by name, such as "loss".
            seconds: duration of the validation, which does not count for the speed of training.
        """
        self.validated_step = self.state.step
        self._log_own({f"val/{name}": value for name, value in values.items()})
        if isinstance(self.schedule, Schedule):
            self.schedule.observe(self.state.metrics)
        self.emit("validation_end")
        self._flush()
        began, samples = self._speed_since
        self._speed_since = (began + seconds, samples)

    def _report(self, values: dict[str, float]) -> None:
        self._log_own(values)
        self._flush()

    def _expected_tags(self) -> set[str]:
        """Return the tags of the values that the trainer will log itself."""
        measured = ["loss", *(metric.name for metric in self.metrics)]
        tags = {f"train/{name}" for name in [*measured, "learning_rate", "samples_per_second"]}
        if self.strategy.world_size > 1:
            tags |= {f"train/{name}" for name in PROCESS_SCALARS}
        if self.val_batches is not None:
            tags |= {f"val/{name}" for name in measured}
        return tags

    def _log_own(self, values: Mapping[str, float]) -> None:
        """Add values of the trainer itself to the record."""
        self._own_tags.update(values)
        self._add(values)

    def _add(self, values: Mapping[str, float | Tensor]) -> None:
        self._record.update(values)
        for tag, value in values.items():
            if not isinstance(value, Tensor):
                self.state.metrics[tag] = value

    def _flush(self) -> None:
        """Pass the record of this step to the loggers."""
        if not self._record:
            return
        values = {tag: float(value) for tag, value in self._record.items()}
        self._record = {}
        self.state.metrics.update(values)
        self.state.history.add(self.state.step, values)
        if self._open_count == 0:
            return
        state = self.state
        with self.clock.part("logging"), disk_errors(self.folder):
            for logger in self.loggers:
                logger.scalars(
                    values, step=state.step, epoch=state.epoch, wall_seconds=state.wall_seconds
                )

    def _open_loggers(self) -> None:
        names = ["loss", *(metric.name for metric in self.metrics)]
        if "run" in self.manifest and self.folder is not None:  # the run has created its folder
            check_exists(self.folder)
        with ExitStack() as opened, disk_errors(self.folder):
            for logger in self.loggers:
                opened.callback(logger.close)
                logger.open(self.folder, self.state.step, names)
            self._closing = opened.pop_all()  # an error in one still closes the others
        self._opened_at = self.state.step

    def emit(self, event: str) -> None:
        """Call the callbacks that listen to an event."""
        if not self._listeners[event]:
            return
        with self.clock.detail("callbacks"):
            try:
                for listener in self._listeners[event]:
                    listener(self)
            except OSError as error:
                check_disk_error(error, self.folder)
                raise

    def _emit_exception(self) -> None:
        """Call `on_exception` of the callbacks; an error in one does not hide that of the fit."""
        for listener in self._listeners["exception"]:
            try:
                listener(self)
            except Exception as error:
                warnings.warn(
                    f"on_exception of a callback also failed: {describe(error)}", stacklevel=2
                )
