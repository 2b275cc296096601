"""Hooks of optimizer steps."""

from torch.optim import Optimizer, optimizer as torch_optimizer


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether a hook listens to the steps of an optimizer, its own or one of all optimizers.

    An update that goes past `optimizer.step()`, for its speed, would not call them. torch has
    functions that register hooks, but none that lists them. In a release without these names the
    answer is True, so that `step()` is called.
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
