"""Carries out the requests of `framework tell` in a running run, and repeats them when it resumes.

The request waits in a file (see `runs/requests.py`). The main process looks for it at the end of a
step, at most twice a second of the time that all processes share, so that all of them do it at the
same step. Between these checks a step only reads the clock.

A change of a setting is written to the events of the run before it takes effect. A run that was
killed after the change and resumes from an earlier checkpoint makes the change again, after the
same step. So it equals a run that was not interrupted, bit for bit.
"""

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from signal import SIGTERM
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.callback import Callback, SavingCallback
from framework.contracts.context import Context
from framework.errors import FrameworkError, RunError, SettingError, did_you_mean
from framework.errors.terminal import print_note
from framework.errors.user_code import text_of
from framework.registry.registry import Maker
from framework.runs.checkpoint import folder_name
from framework.runs.requests import (
    DISCARD,
    REFUSED,
    REQUEST,
    SET,
    Command,
    Refused,
    Request,
    change_text,
    changes,
    drop_older,
    event,
    record,
    row_text,
    take,
    value_text,
    with_id,
)
from framework.runs.status_file import Status
from framework.runtime import seeds
from framework.runtime.clock import PAUSED
from framework.runtime.shared_time import SHARED_TIME
from framework.training.optimizer_state import on_one_element, same_setting

TELL = "tell"
"""`Stop.by` of a run that `framework tell RUN stop` has ended."""
CHECK_SECONDS = 0.5  # between two checks for a request
CHECK_SECONDS_PER_TRIAL = 0.05  # so that many stacked trials look at 20 files a second
PAUSE_SECONDS = 0.2  # between two checks for a request or a signal, while the run is paused
OPTIMIZER = "optimizer."


class Steering(Callback):
    """Carries out requests, and repeats the changes of settings of a resumed run.

    Args:
        settings: the settings of the optimizer that can be changed.
        status: writes that the run is paused.
        resumed_with: the settings that have another value since the run was resumed. Earlier
            changes of these settings are not repeated.
    """

    alone = False  # it changes settings of the optimizer, which stacked trials read in each step

    def __init__(
        self,
        settings: "OptimizerSettings",
        status: Status,
        resumed_with: Collection[str] = (),
    ):
        self.settings = settings
        self.status = status
        self.resumed_with = resumed_with
        self.seconds = CHECK_SECONDS
        self.trials = 1
        self.built = time.time()
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.done: list[str] = []  # the requests whose settings are changed
        self.pending: list[dict[str, Any]] = []  # the rows to repeat, in the order of their steps
        self.next_step = math.inf  # of the first of them
        self.next_check = math.inf
        self.paused = False

    def among(self, trials: int) -> None:
        self.trials = trials
        self.seconds = max(CHECK_SECONDS, trials * CHECK_SECONDS_PER_TRIAL)

    def state_dict(self) -> dict[str, Any]:
        return {"done": list(self.done)} if self.done else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = [name for name in state.get("done", []) if isinstance(name, str)]

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.folder is None:
            return
        self.request_path = os.fspath(trainer.folder / REQUEST)
        self.next_check = SHARED_TIME.now()
        if trainer.strategy.is_main:
            drop_older(trainer.folder, self.built)
        pending = self._read_pending(trainer) if trainer.strategy.is_main else []
        self.pending = trainer.strategy.from_main(pending)
        self._repeat(trainer)

    def on_step_done(self, trainer: Context) -> None:
        if trainer.state.step >= self.next_step:
            self._repeat(trainer)
        now = SHARED_TIME.now()
        if now >= self.next_check:
            self.next_check = now + self.seconds
            [found] = agreed(trainer, self._has_request(trainer))
            if found:
                self._answer(trainer)
                if self.paused:
                    self._wait(trainer)

    # the changes of a resumed run

    def _read_pending(self, trainer: Context) -> list[dict[str, Any]]:
        """Return the rows to repeat; those of settings that the user has changed are discarded.

        Raises:
            RunError: a row cannot be repeated.
        """
        run = trainer.folder
        assert run is not None
        pending = []
        discarded = set()
        for row in changes(run):
            if row["request"] in self.done or row["step"] < trainer.state.step:
                continue
            if row["setting"] in self.resumed_with:
                discarded.add(row["setting"])
                continue
            try:
                self.settings.check(trainer.optimizer, row["setting"], row["new"])
            except SettingError as error:
                raise RunError(f"{run}: its events cannot be repeated: {error}") from error
            pending.append(row)
        for setting in sorted(discarded):
            record(run, [event(trainer.state.step, "", DISCARD, setting=setting)])
            print_note(f"the changes of {setting} by `framework tell` are not repeated")
        return pending

    def _repeat(self, trainer: Context) -> None:
        """Make the changes that are due."""
        while self.pending and self.pending[0]["step"] <= trainer.state.step:
            row = self.pending.pop(0)
            self.settings.change(trainer, row["setting"], row["new"])
            self.done.append(row["request"])
            if trainer.strategy.is_main:
                print_note(f"{change_text(row)}, as before the run was resumed")
        self.next_step = self.pending[0]["step"] if self.pending else math.inf

    # requests

    def _has_request(self, trainer: Context) -> bool:
        return trainer.strategy.is_main and os.path.lexists(self.request_path)

    def _answer(self, trainer: Context) -> None:
        """Take the request and carry it out in all processes (collective)."""
        rows: list[dict[str, Any]] = []
        if trainer.strategy.is_main:
            rows = self._accept(trainer)
        for row in trainer.strategy.from_main(rows):
            self._carry_out(trainer, row)

    def _accept(self, trainer: Context) -> list[dict[str, Any]]:
        """Take and check the request; return the rows to carry out.

        The rows `set` are on the disk then, so that a kill cannot lose a change that had an effect.
        """
        run = trainer.folder
        assert run is not None
        try:
            request = take(run)
            if request is None:
                return []
            rows = self._rows(trainer, request)
            settings = [row for row in rows if row["do"] == SET]
            if settings:
                record(run, settings)
        except FrameworkError as error:
            name = error.request if isinstance(error, Refused) else ""
            print_note(f"refused a request of `framework tell`: {error}")
            self._record(trainer, event(trainer.state.step, name, REFUSED, reason=str(error)))
            return []
        return rows

    def _rows(self, trainer: Context, request: Request) -> list[dict[str, Any]]:
        """Return the rows of a request.

        Raises:
            Refused: a command cannot be carried out.
        """
        rows = []
        paused = self.paused
        for command in request.commands:
            try:
                row = self._row(trainer, command, request.id, paused)
            except SettingError as error:
                raise with_id(Refused(str(error)), request.id) from error
            if command.do in ("pause", "continue"):
                paused = command.do == "pause"
            rows.append(row)
        return rows

    def _row(
        self, trainer: Context, command: Command, request: str, paused: bool
    ) -> dict[str, Any]:
        """Return the row of a command.

        Raises:
            SettingError: it cannot be carried out.
        """
        step = trainer.state.step
        if command.do == SET:
            new = self.settings.check(trainer.optimizer, command.setting, command.value)
            old = self.settings.value(trainer, command.setting)
            return event(step, request, SET, setting=command.setting, old=old, new=new)
        if command.do == "pause" and self.trials > 1:
            raise SettingError(
                f"pause: the run is one of {self.trials} trials that train as one model; `tell` it "
                "to stop, and resume the sweep later"
            )
        if command.do == "pause" and paused:
            raise SettingError("pause: the run is paused already")
        if command.do == "continue" and not paused:
            raise SettingError("continue: the run is not paused")
        if command.do == "checkpoint":
            if not any(isinstance(each, SavingCallback) for each in trainer.callbacks):
                raise SettingError("checkpoint: the run has no callback that saves checkpoints")
            path = f"checkpoints/{folder_name(step)}"
            return event(step, request, "checkpoint", checkpoint=path)
        return event(step, request, command.do)

    def _carry_out(self, trainer: Context, row: dict[str, Any]) -> None:
        """Carry out the command of a row in this process, and record it (collective)."""
        do = row["do"]
        if do == SET:
            self.settings.change(trainer, row["setting"], row["new"])
            if row["request"] not in self.done:
                self.done.append(row["request"])
        elif do == "checkpoint":
            for callback in trainer.callbacks:
                if isinstance(callback, SavingCallback):
                    callback.save_now(trainer)
        elif do == "stop":
            trainer.stop(TELL, "framework tell", SIGTERM)
        else:
            self.paused = do == "pause"
        if trainer.strategy.is_main:
            if do != SET:
                self._record(trainer, row)
            print_note(f"{row_text(row)} (framework tell)")

    def _record(self, trainer: Context, row: Mapping[str, Any]) -> None:
        """Append a row that does not change the weights; if that fails, print a note."""
        assert trainer.folder is not None
        try:
            record(trainer.folder, [row])
        except RunError as error:
            print_note(f"a request of `framework tell` is not recorded: {error}")

    def _wait(self, trainer: Context) -> None:
        """Wait between two steps until the run continues or ends (collective)."""
        with trainer.clock.part(PAUSED):
            if trainer.strategy.is_main:
                self.status.paused(trainer)
            while self.paused:
                time.sleep(PAUSE_SECONDS)
                ends, found = agreed(trainer, trainer.stopping, self._has_request(trainer))
                if ends:
                    break
                if found:
                    self._answer(trainer)
        self.paused = False
        if trainer.strategy.is_main:
            self.status.continued(trainer)


def agreed(trainer: Context, *flags: bool) -> list[bool]:
    """Return which flags are set in any process (collective)."""
    if trainer.strategy.world_size == 1:
        return list(flags)
    counts = trainer.strategy.sum(torch.tensor(flags, dtype=torch.int64))
    return [count > 0 for count in counts.tolist()]


@dataclass
class OptimizerSettings:
    """The settings of an optimizer that can be changed between two steps.

    These are the numbers, and lists of numbers, of its groups of parameters.

    Attributes:
        maker: the optimizer and its settings.
        decays_all: whether the weight decay is for all parameters (`parameters.decay=all`).
    """

    maker: Maker
    decays_all: bool

    def names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of the settings that can be changed."""
        names = []
        for name in self.maker.entry.settings:
            values = [group.get(name) for group in optimizer.param_groups]
            if values and all(map(is_number, values)):
                names.append(name)
        return names

    def check(self, optimizer: Optimizer, setting: str, value: Any) -> Any:
        """Return a new value of a setting as its type.

        Raises:
            SettingError: the setting cannot be changed, or not to this value.
        """
        name = setting.removeprefix(OPTIMIZER)
        names = self.names(optimizer)
        if setting == name or name not in names:
            raise SettingError(f"{setting}: {self.why_not(setting, names)}")
        try:
            new = self.maker.entry.settings[name].convert(value)
        except SettingError as error:
            raise SettingError(f"{setting}={value_text(value)}: {error}") from None
        if not is_number(new):
            raise SettingError(f"{setting}={value_text(value)}: expected a number")
        is_added = name == "weight_decay" and new and not self.initial(name)
        if is_added and not self.decays_all:
            raise SettingError(
                f"{setting}={new}: expected 0: the run began without weight decay, so its biases "
                "and norms, which are not decayed, have no group of their own"
            )
        self.check_update(optimizer, setting, new)
        return list(new) if isinstance(new, tuple) else new

    def why_not(self, setting: str, names: Sequence[str]) -> str:
        """Return the reason that a setting cannot be changed."""
        known = [f"{OPTIMIZER}{name}" for name in names]
        if setting.startswith("trainer."):
            return (
                f"cannot be changed in a running run: stop it, and `framework resume RUN "
                f"{setting}=...`"
            )
        name = setting.removeprefix(OPTIMIZER)
        if setting != name and name in self.maker.entry.settings:
            return f"is used only when the optimizer is built; {did_you_mean(setting, known)}"
        return f"only numbers of the optimizer can be changed; {did_you_mean(setting, known)}"

    def check_update(self, optimizer: Optimizer, setting: str, new: Any) -> None:
        """Raise SettingError if the optimizer refuses a value, or needs other state for it.

        Optimizers over a single element are built and take a step.
        """
        name = setting.removeprefix(OPTIMIZER)
        with seeds.undisturbed():
            try:
                self.maker([nn.Parameter(torch.zeros(2, 2))], **{name: new})
            except FrameworkError as error:
                raise SettingError(f"{setting}={value_text(new)}: {text_of(error)}") from error
            for group in optimizer.param_groups:
                if not group["params"]:
                    continue
                before = state_names(optimizer, group)
                after = state_names(optimizer, {**group, name: new})
                if before is not None and after is not None and before != after:
                    raise SettingError(
                        f"{setting}={value_text(new)}: the optimizer would need other state than "
                        f"with {value_text(group[name])}; start a new run"
                    )

    def initial(self, name: str) -> Any:
        """Return the value that a setting has in the config."""
        return self.maker.settings.get(name, self.maker.entry.settings[name].default)

    def value(self, trainer: Context, setting: str) -> Any:
        """Return the present value of a setting; for a learning rate without the schedule."""
        name = setting.removeprefix(OPTIMIZER)
        initial = self.initial(name)
        values = []
        for index, group in enumerate(trainer.optimizer.param_groups):
            present = group.get("initial_lr", group["lr"]) if name == "lr" else group[name]
            began = self.began_with(trainer, index, name)
            if same_setting(began, initial):
                return list(present) if isinstance(present, tuple) else present
            values.append(present * initial / began if began else present)
        return values[0]

    def change(self, trainer: Context, setting: str, value: Any) -> None:
        """Change a setting in all groups.

        A group that began with a multiple of the value in the config, such as a learning rate of
        its own, keeps the factor. The factor of the schedule applies to the new learning rate.
        """
        name = setting.removeprefix(OPTIMIZER)
        new = self.maker.entry.settings[name].convert(value)
        initial = self.initial(name)
        for index, group in enumerate(trainer.optimizer.param_groups):
            own = scaled(new, initial, self.began_with(trainer, index, name))
            if name == "lr":
                group["initial_lr"] = own
            if name != "lr" or trainer.schedule is None:
                group[name] = own

    def began_with(self, trainer: Context, index: int, name: str) -> Any:
        """Return the value with which the fit has built a setting of a group."""
        if index >= len(trainer.optimizer_settings):  # a callback has added the group
            return self.initial(name)
        return trainer.optimizer_settings[index]["settings"][name]


def scaled(new: Any, initial: Any, began: Any) -> Any:
    """Return the new value of a setting in a group.

    Args:
        new: the new value of the setting.
        initial: its value in the config.
        began: the value with which the group was built.
    """
    if same_setting(began, initial) or isinstance(new, list | tuple) or not initial:
        return new
    return new * (began / initial)


def is_number(value: Any) -> bool:
    """Return whether a value is a number, or a list of numbers."""
    numbers = value if isinstance(value, list | tuple) and value else [value]
    return all(type(number) in (int, float) for number in numbers)


def state_names(optimizer: Optimizer, group: dict[str, Any]) -> set[str] | None:
    """Return the names of the state tensors that a group needs; None if they are not known."""
    try:
        small, element = on_one_element(optimizer, group, group["params"][0])
        small.step()
    except Exception:  # its state is known after its first step only
        return None
    return {name for name, value in small.state[element].items() if isinstance(value, Tensor)}
