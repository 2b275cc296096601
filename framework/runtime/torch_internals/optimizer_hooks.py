"""Hooks of optimizer steps."""

from torch.optim import Optimizer, optimizer as torch_optimizer


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether the steps of an optimizer have hooks, including hooks of all optimizers.

    Gain: torch has public functions that register hooks, but none that lists them. A faster update
    that does not call `optimizer.step()` would skip them. In a release of torch without these names
    the answer is True, so that `step()` is called.
    """
    try:
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )
    except AttributeError:
        return True
