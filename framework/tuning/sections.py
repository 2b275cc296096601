"""Registers the section `sweep`, sweepers and launchers, when it is imported."""

from framework.composition.sections import HydraPlugin, Section, register

DEFAULTS = {"sweeper": "grid", "launcher": "one_by_one"}
"""Replacements for Hydra's `basic`."""

register(
    Section("sweep", "framework.tuning.sweep.settings:Sweep", of_run=False),
    HydraPlugin("sweeper", "grid", "framework.tuning.sweep.grid:Grid", in_files=True),
    HydraPlugin(
        "sweeper",
        "optuna",
        "framework.tuning.search.search:OptunaSweeper",
        schema="framework.tuning.search.settings:Search",
        in_files=True,
        needs="optuna",
    ),
    HydraPlugin("launcher", "one_by_one", "framework.tuning.sweep.launcher:OneByOne"),
    HydraPlugin("launcher", "vectorized", "framework.tuning.vectorized.launcher:Vectorized"),
    HydraPlugin("launcher", "auto", "framework.tuning.vectorized.launcher:Auto"),
    HydraPlugin(
        "launcher",
        "joblib",
        "framework.tuning.sweep.joblib_launcher:Joblib",
        replaces="hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    ),
)
