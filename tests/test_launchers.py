"""The same command line with Hydra's launchers: processes of this machine, jobs of a cluster."""

import importlib.util
from pathlib import Path

import pytest

from framework import cli
from framework.tuning.folder import SweepFolder
from framework.tuning.study import storage_in

QUICK = ["trainer.max_steps=4", "model.width=8", "loggers=json_lines", "callbacks=[checkpoint]"]
SEARCH = ["hydra/sweeper=optuna", "hydra.sweeper.trials=2", "hydra.sweeper.parallel=2", "hydra.sweeper.seed=3"]
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        ["hydra.launcher.submitit_folder=jobs", "hydra.sweeper.trials=1"],
    ),
    "ray": (
        "hydra_plugins.hydra_ray_launcher",
        ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
    ),
}


@pytest.fixture(params=LAUNCHERS)
def launcher(request, tmp_path, monkeypatch):
    package, settings = LAUNCHERS[request.param]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None or (request.param == "ray" and importlib.util.find_spec("ray") is None):
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    storage_in.cache_clear()
    return [f"hydra/launcher={request.param}", *settings]


def search(name, *overrides):
    space = ["optimizer.lr=tag(log, interval(1e-3, 1e-1))", f"sweep.name={name}"]
    cli.run(["train", "-m", *QUICK, *SEARCH, *space, *overrides])
    return SweepFolder(Path("runs/default") / name)


def test_a_search_with_a_launcher_finds_what_it_finds_alone(launcher, capsys):
    away = search("away", *launcher)
    storage_in.cache_clear()
    here = search("here", f"hydra.sweeper.trials={len(away.trials())}")
    assert [trial.state for trial in away.trials()] == ["done"] * len(here.trials())
    assert [trial.settings for trial in away.trials()] == [trial.settings for trial in here.trials()]
    assert [t.metrics["val/loss"] for t in away.trials()] == [t.metrics["val/loss"] for t in here.trials()]
    assert all((away.path / trial.folder / "config.yaml").is_file() for trial in away.trials())
