"""TensorBoard's HParams page with the most important metrics first.

The page shows the first five metrics until the user selects others. TensorBoard sorts metrics by
name; an event file can give another order only together with a fixed list of settings for all runs,
which would hide the settings of runs with other parts.
"""

from typing import Any

from tensorboard.plugins.hparams import backend_context, hparams_plugin

OBSERVED = (
    "health/",
    "speed/",
    "train/communication",
    "train/gradient_norm",
    "train/learning_rate",
    "train/samples_per_second",
    "train/slowest_process",
    "train/waiting",
)
"""Prefixes of values that do not tell how good a model is."""


class HParamsPage(hparams_plugin.HParamsPlugin):  # type: ignore[misc]
    """The HParams page, with the metrics in the order of `importance`."""

    def __init__(self, context: Any):
        super().__init__(context)
        self._context = OrderedMetrics(context)


class OrderedMetrics(backend_context.Context):  # type: ignore[misc]
    """Reads settings and metrics of runs; all routes of the page use the same order."""

    def experiment_from_metadata(self, *args: Any, **options: Any) -> Any:
        """Return the settings and metrics of all runs."""
        experiment = super().experiment_from_metadata(*args, **options)
        metrics = list(experiment.metric_infos)
        tags = {metric.name.tag for metric in metrics}
        metrics.sort(key=lambda metric: importance(metric.name.tag, tags))
        experiment.ClearField("metric_infos")
        experiment.metric_infos.extend(metrics)
        return experiment


def importance(tag: str, tags: set[str]) -> tuple[int, bool, str]:
    """Return the sort key of a metric: those of the test and validation split come first.

    Args:
        tag: of the metric, such as "val/loss".
        tags: of all metrics.
    """
    split, _, name = tag.partition("/")
    if split in ("test", "val"):
        group = ("test", "val").index(split)
    elif split == "train" and (name == "loss" or f"val/{name}" in tags):
        group = 2
    elif tag.startswith(OBSERVED):
        group = 4
    else:
        group = 3
    return group, name != "loss", tag


def plugins() -> list[Any]:
    """Return TensorBoard's plugins with this page in place of its own."""
    from tensorboard import default

    pages: list[Any] = default.get_plugins()
    own = hparams_plugin.HParamsPlugin
    return [HParamsPage if page is own else page for page in pages]
