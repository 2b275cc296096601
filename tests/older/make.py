"""Create the folders of these tests: runs, sweeps and a search, interrupted in mid-epoch.

Commit 22928a6 wrote them, before the modules moved into packages. They must not change, because
later versions must resume them. This script documents their creation; it works only with that
commit (`python make.py` in an environment with that version; as root on Linux, for `unshare`). The
process sends SIGINT to itself after a fixed step, so that the result is reproducible.
`NAME.expected.json` has the results of the same commands without an interruption.

Host name, platform and the paths of the parts in provenance.json are replaced by neutral values;
no code reads them. Lock files are removed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TRIAL = ("number", "folder", "state", "settings", "steps")
TIMES = ("wall_seconds", "train/samples_per_second", "train/seconds_per_epoch")

STOPPED = """
import os, signal, sys
from framework.trainer import Trainer

stepped = Trainer.stepped

def stop_after(self, last):
    stepped(self, last)
    if sys.argv[1] in self.folder.name and self.state.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGINT)

Trainer.stepped = stop_after
from framework.cli import main
main(sys.argv[3:])
"""

RUN = [
    *["train", "run.name=run", "data=wine", "model.width=8", "model.depth=1", "model.dropout=0.1"],
    *["model.norm=batch", "loss=cross_entropy", "loss.weight=balanced", "transforms=[noise]"],
    *["optimizer=adam", "optimizer.lr=0.02", "optimizer.amsgrad=true"],
    *["scheduler=reduce_on_plateau", "scheduler.patience=0", "scheduler.threshold=0.3"],
    *["scheduler.factor=0.5", "metrics=[accuracy,f1,auroc]", "trainer.max_epochs=6"],
    *["trainer.log_every=3steps", "loader.batch_size=16"],
    "callbacks=[checkpoint,non_finite,gradient_norm,early_stop,ema,timer]",
    "callbacks.checkpoint.keep=1",
    "callbacks.early_stop.patience=4",
    "+callbacks={name: accumulation, schedule: {0: 1, 2: 2}}",
    "+callbacks={name: freeze, patterns: [head.*], epochs: 1}",
]
PLUGIN_RUN = [
    *["train", "--plugins", "mine.py", "run.name=plugin_run", "data=diabetes", "task=regression"],
    *["model=small", "optimizer=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9"],
    *["scheduler=cosine", "scheduler.warmup=3", "metrics=[mae,r2]", "trainer.max_epochs=4"],
    *["loader.batch_size=64", "loggers=[json_lines]"],
    *["callbacks=[checkpoint,clip_gradients,loss_trace,swa]", "callbacks.swa.start=1"],
    *["callbacks.checkpoint.keep=1", "callbacks.checkpoint.monitor=null"],
]
SMALL = [
    *["data=iris", "model.width=4", "model.depth=1", "model.dropout=0.1", "trainer.max_epochs=4"],
    *["loader.batch_size=16", "loggers=[json_lines]", "callbacks=[checkpoint,early_stop]"],
    *["callbacks.checkpoint.keep=1", "callbacks.checkpoint.monitor=null"],
    "callbacks.checkpoint.every=1000steps",
]
SWEEP = [
    *("train", "-m", *SMALL, "sweep.name=sweep", "optimizer.lr=0.05"),
    *("optimizer=adam,sgd", "seed=0,1"),
]
VECTORIZED = [
    *("train", "-m", *SMALL, "sweep.name=vectorized_sweep"),
    *("optimizer.lr=0.02,0.05", "activation=relu,gelu,tanh"),
    *("hydra/launcher=vectorized", "hydra.launcher.processes=1"),
]
SEARCH = [
    *("train", "-m", *SMALL, "sweep.name=search", "hydra/sweeper=optuna"),
    *("hydra.sweeper.trials=4", "hydra.sweeper.startup=1"),
    *("optimizer.lr=tag(log, interval(1e-3, 1e-1))", "activation=relu,tanh"),
]
AUTO = ["resume=auto"]
CASES = {  # name: command, command that resumes it, the interrupted run and its last step
    "run": (RUN, ["resume", "runs/default/run"], "run", 23),
    "plugin_run": (
        PLUGIN_RUN,
        ["resume", "runs/default/plugin_run", "--plugins", "mine.py"],
        "plugin_run",
        13,
    ),
    "sweep": (SWEEP, [*SWEEP, *AUTO], "001_", 17),
    "vectorized_sweep": (VECTORIZED, [*VECTORIZED, *AUTO], "001_", 17),
    "search": (SEARCH, [*SEARCH, *AUTO], "001_", 17),
}


def framework(arguments, folder, stopped=None):
    """Run a command in a folder; `stopped` is the run and the step of an interruption."""
    program = ["-m", "framework"] if stopped is None else ["-c", STOPPED, *map(str, stopped)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    named = ["unshare", "--uts", "sh", "-c", 'hostname host && exec "$@"', "sh"]
    ended = subprocess.run(
        [*named, sys.executable, *program, *arguments],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    wanted = 130 if stopped else 0
    if ended.returncode != wanted:
        sys.exit(f"{ended.returncode} of {arguments}\n{ended.stdout}{ended.stderr}")
    return ended


def logged(run):
    """Return the lines of metrics.jsonl, without values that depend on time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in TIMES:
            line.pop(key, None)
    return lines


def weights(run):
    """Return a checksum of the weights in the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-????????"))
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def outcome(folder):
    """Return the result of a run, or of each trial of a sweep."""
    if (folder / "metrics.jsonl").is_file():
        return {"metrics": logged(folder), "weights": weights(folder)}
    rows = map(json.loads, (folder / "sweep.jsonl").read_text().splitlines())
    last = {row["number"]: row for row in rows}
    trials = []
    for number in sorted(last):
        trial = {key: last[number][key] for key in TRIAL}
        metrics = last[number]["metrics"].items()
        trial["metrics"] = {key: value for key, value in metrics if key not in TIMES}
        trials.append(trial)
    runs = {trial["folder"]: outcome(folder / trial["folder"]) for trial in trials}
    return {"trials": trials, "runs": runs}


def make_neutral(folder):
    """Replace the values that depend on the machine, and remove the lock files."""
    for file in folder.rglob("provenance.json"):
        facts = json.loads(file.read_text())
        facts["platform"] = "Linux"
        for name, place in facts["parts"].items():
            place = re.sub(r".*/(?=plugins/|site-packages/)", "", place)
            facts["parts"][name] = re.sub(r".*/(?=mine\.py)", "/project/", place)
        if facts["plugins"]:
            facts["plugins"] = ["/project/mine.py"]
        file.write_text(json.dumps(facts, indent=2) + "\n")
    for file in [*folder.rglob(".lock"), *folder.rglob("sweep.lock")]:
        file.unlink()


def measured(run, folder):
    """Return the output of `eval` and `predict` for the checkpoints of an interrupted run."""
    plugins = ["--plugins", "mine.py"] if run.name == "plugin_run" else []
    found = {}
    for split in ("val", "test"):
        evaluate = ["eval", str(run), "--split", split, "--json", *plugins]
        printed = json.loads(framework(evaluate, folder).stdout)
        found.update(printed.get("metrics", printed))  # 0.2 and older print the values alone
    columns = json.loads((folder / run / "facts.json").read_text())["data"]["columns"]
    inputs = ",".join(column["name"] for column in columns) + "\n"
    for shift in (-1, 0, 1):
        row = [str(column["mean"] + shift * column["std"]) for column in columns]
        inputs += ",".join(row) + "\n"
    (folder / "inputs.csv").write_text(inputs)
    files = ["--input", "inputs.csv", "--output", "predicted.jsonl"]
    framework(["predict", str(run), *files, *plugins], folder)
    lines = (folder / "predicted.jsonl").read_text().splitlines()
    predicted = [json.loads(line) for line in lines]
    return {"eval": found, "inputs": inputs, "predicted": predicted}


def make(name, scratch):
    """Create a folder and its expected values, and check that it resumes to them."""
    command, resume, stopped_run, step = CASES[name]
    left = {}
    for kind, stopped in (("uninterrupted", None), ("interrupted", (stopped_run, step))):
        folder = scratch / kind
        folder.mkdir(parents=True)
        shutil.copy(HERE / "mine.py", folder)
        framework(command, folder, stopped)
        left[kind] = folder / "runs/default" / name
    whole = outcome(left["uninterrupted"])
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(left["interrupted"], target, symlinks=True)
    make_neutral(target)

    resumed = scratch / "resumed"
    shutil.copytree(target, resumed / "runs/default" / name, symlinks=True)
    shutil.copy(HERE / "mine.py", resumed)
    expected = {"command": command, "resume": resume}
    if not (target / "sweep.jsonl").is_file():
        expected |= measured(Path("runs/default") / name, resumed)
    framework(resume, resumed)
    if outcome(resumed / "runs/default" / name) != whole:
        sys.exit(f"{name}: the resumed run differs from the uninterrupted one")
    (HERE / f"{name}.expected.json").write_text(json.dumps(expected | whole, indent=1) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            make(name, Path(scratch))
