"""What to do when a loss or a gradient is not finite: found before the update, so that no weight ever is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from framework import (
    Callback,
    Context,
    FrameworkError,
    NonFiniteFlag,
    PositiveInt,
    SavingCallback,
    SettingError,
    callbacks,
    checkpoints,
    numbers_of,
    restore_optimizer,
)
from framework.contracts.callback import keyed

ADVICE = "A lower learning rate, warm-up or clip_gradients may help."


class Diverged(FrameworkError):
    """The loss is no number any more. A result of the run, not a mistake in what was asked: hence another status."""

    exit_status = 3


@callbacks.register("non_finite", aliases=["stop_on_nan", "terminate_on_nan"])
class NonFinite(Callback):
    """Looks before each update whether the loss and all gradients are finite, and does what the policy says if not.

    Place it before callbacks that change gradients. With an fp16 scaler only the loss is looked at: gradients that
    overflow are the scaler's business. Under skip and rewind the step counts (schedule and data go on, so that the
    same batch is not met again before the next epoch), its loss and metrics do not, and train/skipped_steps is logged.
    On an accelerator `raise` does not wait for the gradients when the optimizer is fused: from the first one that is
    not finite on, the device itself leaves every update out, and the error comes at the next look (log, validation,
    checkpoint). Elsewhere each step waits.
    """

    follows_metrics = False
    recordable = False

    def __init__(
        self, policy: Literal["raise", "skip", "rewind"] = "raise", most_skips: PositiveInt = 10
    ):
        """Choose what happens.

        Args:
            policy: raise ends the run; skip leaves the update out; rewind goes back to the weights and the optimizer's
                state of the newest good checkpoint (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
            most_skips: after more than so many steps in a row without an update the run ends.
        """
        self.policy, self.most_skips = policy, most_skips
        self.alone = policy != "raise"  # a step that is left out is left out of the sums too
        self.skipped = self.in_a_row = 0
        self.checked = 0  # the last step that is known to be finite
        self.late = self.together = False
        self.trainer: Context | None = None
        self.found: NonFiniteFlag | None = None

    def reset(self) -> None:
        self.skipped = self.in_a_row = 0
        self.checked = 0
        self.late = False
        self.trainer = None

    @classmethod
    def depends_on(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        return ["callbacks.checkpoint."] if settings.get("policy") == "rewind" else []

    def among(self, trials: int) -> None:
        self.together = (
            True  # the gradients of all are read at once in each step: nothing is gained by waiting
        )

    def on_fit_start(self, trainer: Context) -> None:
        if self.policy == "rewind" and trainer.folder is None:
            raise SettingError("non_finite: to rewind, the run needs a folder with checkpoints")
        self.trainer, self.checked = trainer, trainer.state.step
        self.found = NonFiniteFlag(trainer.device)
        fused = bool(trainer.optimizer.defaults.get("fused"))
        on_device = trainer.device.type != "cpu" and fused and not self.together
        self.late = self.recordable = self.policy == "raise" and on_device

    def on_step_start(self, trainer: Context) -> None:
        if self.policy != "raise":
            self.measured = trainer.measures.mark()
            self.buffers = [buffer.clone() for buffer in trainer.model.buffers()]

    def needs_gradients(self, trainer: Context) -> bool:
        return False

    def on_gradients(self, trainer: Context) -> None:
        self.found.check([trainer.loss, *gradients(trainer)])
        if self.late:
            trainer.optimizer.found_inf = self.found.value  # type: ignore[attr-defined]
        elif self.found.value.item():
            self._act(trainer)
        else:
            self.in_a_row = 0

    def on_log(self, trainer: Context) -> None:
        self._look()
        if self.policy != "raise":
            trainer.log({"train/skipped_steps": self.skipped})

    def on_validation_start(self, trainer: Context) -> None:
        self._look()

    def on_fit_end(self, trainer: Context) -> None:
        self._look()
        self._release(trainer)

    def on_exception(self, trainer: Context) -> None:
        self._release(trainer)

    def _release(self, trainer: Context) -> None:
        """Let the optimizer make all its updates again after the fit."""
        if (
            self.found is not None
            and getattr(trainer.optimizer, "found_inf", None) is self.found.value
        ):
            del trainer.optimizer.found_inf  # type: ignore[attr-defined]

    def _look(self) -> None:
        """Read the verdict on the steps since the last look, where it was not read at once."""
        if not self.late or self.trainer is None:
            return
        step = self.trainer.state.step
        if self.found.value.item():
            raise Diverged(
                f"non_finite: the loss or a gradient is not finite in a step from {self.checked + 1} to {step}; the "
                f"weights are those before it. {ADVICE}"
            )
        self.checked = step

    def _act(self, trainer: Context) -> None:
        self.in_a_row += 1
        if self.policy == "raise" or self.in_a_row > self.most_skips:
            raise Diverged(self._story(trainer))
        self.found.value.zero_()
        self.skipped += 1
        trainer.measures.undo(self.measured)
        for buffer, before in zip(trainer.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)  # running statistics have seen the batch
        if self.policy == "rewind":
            rewind(trainer, self._checkpoint(trainer))
        trainer.optimizer.zero_grad(
            set_to_none=True
        )  # without gradients an optimizer changes nothing

    def _story(self, trainer: Context) -> str:
        told = [f"the loss is {float(trainer.loss):.6g} at step {trainer.state.step + 1}"]
        named = (
            (name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None
        )
        bad = next((name for name, grad in named if not numbers_of(grad).isfinite().all()), None)
        told.append(
            "all gradients are finite"
            if bad is None
            else f"the first gradient not finite is of {bad}"
        )
        samples = trainer.sample_indices()
        if samples:
            more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
            told.append(f"the batch holds samples {', '.join(map(str, samples[:8]))}{more}")
        if self.policy != "raise":
            told.append(f"{self.in_a_row - 1} updates before were left out in a row (most_skips)")
        return f"non_finite: {'; '.join(told)}. {ADVICE}"

    def _checkpoint(self, trainer: Context) -> Path:
        for callback in trainer.callbacks:
            if isinstance(callback, SavingCallback):
                callback.finish_saving()  # or which one is newest would depend on the disk
        assert trainer.folder is not None
        found, skipped = checkpoints.newest(trainer.folder / "checkpoints")
        if found is None:
            why = f" ({skipped[0]})" if skipped else ""
            raise Diverged(
                f"{self._story(trainer)} There is no good checkpoint yet to go back to{why}."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        self._look()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


def gradients(trainer: Context) -> list[Tensor]:
    """All gradients of the optimizer's parameters; none where a scaler looks after them."""
    if trainer.precision.scaler is not None:
        return []
    groups = trainer.optimizer.param_groups
    return [grad for group in groups for p in group["params"] if (grad := p.grad) is not None]


def rewind(trainer: Context, checkpoint: Path) -> None:
    """Take weights, optimizer, scaler and averages from a checkpoint; counters, schedule, data and randomness go on."""
    model, saved = checkpoints.load(checkpoint)
    trainer.model.load_state_dict(model)
    before, now = saved.get("optimizer_settings"), trainer.optimizer_settings
    restore_optimizer(trainer.optimizer, saved["optimizer"], before, now)
    trainer.precision.load_state_dict(saved["scaler"])
    for key, callback in keyed(trainer.callbacks).items():
        callback.on_rewind(saved["callbacks"].get(key, {}))
