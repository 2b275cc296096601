"""Stored loss curves of 20 steps of three experiments, which detect changes in training.

After an intended change:  python tests/experiment/test_golden.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from framework.composition.compose import CommandLine, run_composed
from framework.experiment.experiment import train

FOLDER = Path(__file__).parents[1] / "golden"
EXPERIMENTS = ("default", "digits_cnn", "digits_transformer")


def curve(experiment: str, folder: Path) -> dict[int, float]:
    """Train 20 steps on one thread and return the loss of each."""
    chosen = [] if experiment == "default" else [f"experiment={experiment}"]
    limits = [
        "trainer.max_steps=20",
        "trainer.max_epochs=null",
        "trainer.log_every=1steps",
        "trainer.device=cpu",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        line = CommandLine(
            [*chosen, *limits, "loggers=json_lines", "callbacks=null", f"run.root={folder}"]
        )
        run_composed(
            line, lambda job: results.append(train(job.spec, job.experiment, job.overrides))
        )
    finally:
        torch.set_num_threads(threads)
    lines = map(json.loads, (results[0].folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_losses_are_the_stored_ones(experiment, tmp_path):
    kept = [line.split() for line in (FOLDER / f"{experiment}.txt").read_text().splitlines()]
    expected = {int(step): float(loss) for step, loss in kept}
    losses = curve(experiment, tmp_path)
    assert losses.keys() == expected.keys()
    for step, loss in losses.items():
        # Other processors add in another order. The difference grows: measured 5e-5 at step 5,
        # 3e-3 at step 19.
        tolerance = 2e-4 if step <= 5 else 1e-2
        assert loss == pytest.approx(expected[step], rel=tolerance), f"step {step}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in EXPERIMENTS:
        with TemporaryDirectory() as scratch:
            losses = curve(name, Path(scratch))
        (FOLDER / f"{name}.txt").write_text(
            "".join(f"{step} {loss:.6f}\n" for step, loss in losses.items())
        )
