"""Detection of losses and gradients that are not finite, before they reach the weights."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from framework import (
    NON_FINITE,
    Callback,
    Context,
    FrameworkError,
    NonFiniteFlag,
    PositiveInt,
    RunError,
    SavingCallback,
    SettingError,
    callbacks,
    checkpoints,
    dtensors,
    files,
    numbers_of,
    restore_optimizer,
)
from framework.contracts.callback import keyed

from .gradients import gradients_of

ADVICE = "A lower learning rate, warm-up or clip_gradients may help."


class Diverged(FrameworkError):
    """The loss or a gradient is not finite: a result of the run, not a user error."""

    exit_status = 3


@callbacks.register("non_finite", aliases=["stop_on_nan", "terminate_on_nan"])
class NonFinite(Callback):
    """Checks before each update that the loss and all gradients are finite, and applies a policy.

    Place it before callbacks that change gradients. With an fp16 scaler it checks the loss only,
    since the scaler handles gradients that overflow. With skip and rewind, the step counts
    (schedule and data continue, so the same batch does not come again before the next epoch), but
    its loss and metrics do not; train/skipped_steps is logged. On an accelerator with a fused
    optimizer, `raise` does not wait for the gradients: the device itself omits every update after
    the first value that is not finite, and the next log, validation or checkpoint raises the error.
    In all other cases each step waits for the result.

    Args:
        policy: raise ends the run; skip omits the update; rewind restores the weights and the
            optimizer's state from the newest good checkpoint (Chowdhery et al. 2022,
            arXiv:2204.02311, section 5.1).
        most_skips: maximum number of skipped steps in a row; the next one ends the run.
    """

    follows_metrics = False
    recordable = False

    def __init__(
        self, policy: Literal["raise", "skip", "rewind"] = "raise", most_skips: PositiveInt = 10
    ):
        self.policy = policy
        self.most_skips = most_skips
        self.alone = policy != "raise"  # a skipped step is also removed from the sums of metrics
        self.skipped = 0
        self.in_a_row = 0
        self.checked = 0  # the last step that is known to be finite
        self.deferred = False  # whether the device omits updates, and the flag is read later
        self.vectorized = False
        self.trainer: Context | None = None
        self.flag: NonFiniteFlag | None = None

    def reset(self) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self.checked = 0
        self.deferred = False
        self.trainer = None

    @classmethod
    def depends_on(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        return ["callbacks.checkpoint."] if settings.get("policy") == "rewind" else []

    def among(self, trials: int) -> None:
        self.vectorized = True  # each step reads the gradients of all trials: no gain in deferring

    def on_fit_start(self, trainer: Context) -> None:
        if self.policy == "rewind" and trainer.folder is None:
            raise SettingError("non_finite: to rewind, the run needs a folder with checkpoints")
        self.trainer = trainer
        self.checked = trainer.state.step
        self.flag = NonFiniteFlag(trainer.device)
        fused = bool(trainer.optimizer.defaults.get("fused"))
        device_can_skip = trainer.device.type != "cpu" and fused
        self.deferred = self.policy == "raise" and device_can_skip and not self.vectorized
        self.recordable = self.deferred

    def on_step_start(self, trainer: Context) -> None:
        if self.policy != "raise":
            self.measures_before = trainer.measures.mark()
            self.buffers = [buffer.clone() for buffer in trainer.model.buffers()]

    def needs_gradients(self, trainer: Context) -> bool:
        return False

    def on_gradients(self, trainer: Context) -> None:
        assert self.flag is not None
        checked = [trainer.loss]
        if trainer.precision.scaler is None:  # a scaler checks the gradients itself
            checked += gradients_of(trainer.optimizer)
        self.flag.check(checked)
        if self.deferred:
            trainer.optimizer.found_inf = self.flag.value  # type: ignore[attr-defined]
        elif self.flag.value.item():
            self._apply_policy(trainer)
        else:
            self.in_a_row = 0

    def on_log(self, trainer: Context) -> None:
        self._read_flag()
        if self.policy != "raise":
            trainer.log({"train/skipped_steps": self.skipped})

    def on_validation_start(self, trainer: Context) -> None:
        self._read_flag()

    def on_fit_end(self, trainer: Context) -> None:
        self._read_flag()
        self._release(trainer)

    def on_exception(self, trainer: Context) -> None:
        self._release(trainer)

    def state_dict(self) -> dict[str, Any]:
        self._read_flag()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state.get("skipped", 0)
        self.in_a_row = state.get("in_a_row", 0)

    def _read_flag(self) -> None:
        """Raise Diverged for a deferred result since the last call."""
        if not self.deferred or self.trainer is None:
            return
        assert self.flag is not None
        step = self.trainer.state.step
        if self.flag.value.item():
            record(self.trainer, self.checked + 1, step)
            raise Diverged(
                f"non_finite: the loss or a gradient is not finite in a step from "
                f"{self.checked + 1} to {step}; the weights are those before it. {ADVICE}"
            )
        self.checked = step

    def _release(self, trainer: Context) -> None:
        """Let the optimizer make all updates again after the fit."""
        if self.flag is None:
            return
        if getattr(trainer.optimizer, "found_inf", None) is self.flag.value:
            del trainer.optimizer.found_inf  # type: ignore[attr-defined]

    def _apply_policy(self, trainer: Context) -> None:
        assert self.flag is not None
        self.in_a_row += 1
        if self.policy == "raise" or self.in_a_row > self.most_skips:
            raise Diverged(self._report(trainer))
        self.flag.value.zero_()
        self.skipped += 1
        trainer.measures.undo(self.measures_before)
        for buffer, value in zip(trainer.model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)  # running statistics include the batch
        if self.policy == "rewind":
            rewind(trainer, self._newest_checkpoint(trainer))
        trainer.optimizer.zero_grad(set_to_none=True)  # the optimizer then changes no weight

    def _report(self, trainer: Context) -> str:
        """Return the description of the step, and record the step (collective)."""
        record(trainer, trainer.state.step + 1, trainer.state.step + 1)
        facts = [f"the loss is {float(trainer.loss):.6g} at step {trainer.state.step + 1}"]
        parameter = parameter_with_bad_gradient(trainer)
        if parameter is None:
            facts.append("all gradients are finite")
        else:
            facts.append(f"the first gradient that is not finite is that of {parameter}")
        samples = trainer.sample_indices()
        if samples is not None and trainer.strategy.world_size > 1:  # empty in some processes
            samples = sorted(chain.from_iterable(trainer.strategy.gather(samples)))
        if samples:
            more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
            facts.append(f"the batch contains samples {', '.join(map(str, samples[:8]))}{more}")
        if self.policy != "raise":
            facts.append(f"{self.in_a_row - 1} updates in a row were skipped before (most_skips)")
        return f"non_finite: {'; '.join(facts)}. {ADVICE}"

    def _newest_checkpoint(self, trainer: Context) -> Path:
        """Return the newest good checkpoint (collective)."""
        for callback in trainer.callbacks:
            if isinstance(callback, SavingCallback):
                callback.finish_saving()  # otherwise the choice would depend on the disk's speed
        assert trainer.folder is not None
        found = None
        if trainer.strategy.is_main:  # the only process that writes checkpoints
            found = checkpoints.newest(trainer.folder / "checkpoints")
        checkpoint, skipped = trainer.strategy.from_main(found)
        if checkpoint is None:
            reason = f" ({skipped[0]})" if skipped else ""
            raise Diverged(
                f"{self._report(trainer)} There is no good checkpoint to rewind to yet{reason}."
            )
        return checkpoint


def record(trainer: Context, first: int, last: int) -> None:
    """Write the steps of which one is not finite, for `framework explain nan`."""
    if trainer.folder is None or not trainer.strategy.is_main:
        return
    content = json.dumps({"first": first, "last": last})
    with suppress(RunError):  # the error of the step is more important
        files.write_file(trainer.folder, NON_FINITE, content + "\n")


def parameter_with_bad_gradient(trainer: Context) -> str | None:
    """Return the name of the first parameter with a gradient that is not finite (collective)."""
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is None:
            continue
        if not dtensors.full_tensor(numbers_of(parameter.grad).isfinite().all()):
            return name
    return None


def rewind(trainer: Context, checkpoint: Path) -> None:
    """Restore weights, optimizer, scaler and averages from a checkpoint.

    Counters, schedule, data and random state continue.
    """
    model, saved = checkpoints.load(checkpoint)
    dtensors.load_model_state(trainer.model, model)
    restore_optimizer(
        trainer.optimizer,
        saved["optimizer"],
        saved.get("optimizer_settings"),
        trainer.optimizer_settings,
    )
    trainer.precision.load_state_dict(saved["scaler"])
    for key, callback in keyed(trainer.callbacks).items():
        callback.on_rewind(saved["callbacks"].get(key, {}))
