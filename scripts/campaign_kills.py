"""Kill training runs at random times or start them twice, and compare with undisturbed runs."""

import mmap
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from campaign_runs import differences, done, fork, spec_of, status_of

import framework as fw
from framework.composition.spec import Spec
from framework.errors import CheckpointError, RunError
from framework.experiment.experiment import train
from framework.runs.checkpoint import listed, load, sharded, step_of, writing
from framework.training.trainer import Trainer

STEPS = 60
EVERY = 4  # steps between checkpoints, unless a variant sets another interval
UNSAVED = 3  # with background saves: limit of the lost seconds, as a multiple of the unsaved ones
REFUSED = 3  # exit status of a process without permission to write

MODELS = {
    "mlp": ["model=mlp", "model.width=24", "model.dropout=0.1"],
    "cnn": [
        "model=cnn",
        "model.channels=[4,8]",
        "model.norm=batch",
        "model.dropout=0.2",
        "data.image=true",
    ],
    "transformer": [
        "model=transformer",
        "model.width=16",
        "model.depth=1",
        "model.heads=2",
        "model.dropout=0.1",
        "data.image=true",
    ],
}
# tasks with two updates per step, random codes, views of inputs, several outputs, a teacher
MODELS |= {
    "gan": ["model=gan", "model.widths=[16]", "task=adversarial", "task.penalty=1", "metrics=[]"],
    "autoencoder": ["model=autoencoder", "model.widths=[16]", "task=reconstruction", "metrics=[]"],
    "vae": [
        "model=vae",
        "model.widths=[16]",
        "task=variational",
        "task.likelihood=gaussian",
        "metrics=[]",
    ],
    "contrastive": [*MODELS["cnn"], "task=contrastive", "metrics=[]"],
    "multi_task": [*MODELS["mlp"], "task=multi_task"],
    "distillation": [*MODELS["mlp"], "task=distillation", "task.teacher={root}/campaign/teacher"],
}
OWN_DATA = {  # texts of different lengths in pools, windows of a long text, tables, series
    "text": ["data=text_table", "data.path={root}/texts.csv", "model=text_lstm", "model.width=8"],
    "language": [
        "data=stdlib_source",
        "data.characters=60000",
        "data.length=32",
        "task=language_modelling",
        "model=decoder",
        "model.width=16",
        "model.depth=1",
        "model.heads=2",
        "metrics=[]",
    ],
    "table": [
        "data=diabetes",
        "task=regression",
        "metrics=[mae]",
        "model.width=24",
        "model.dropout=0.1",
    ],
    "series": [
        "data=series",
        "data.path={root}/series.csv",
        "data.target=load",
        "data.lookback=8",
        "data.horizon=4",
        "task=regression",
        "metrics=[mae]",
        "model=linear_forecast",
    ],
}
MODELS |= OWN_DATA
BACKGROUND = "callbacks.checkpoint.background=true"
EACH_STEP = "callbacks.checkpoint.every=1steps"
AUGMENTED = ["data=noisy_digits"]
FP16 = ["trainer.precision=fp16"]
VARIANTS = {
    "plain": [],
    "accumulate": ["trainer.accumulate=3"],
    "fp16": FP16,
    "ema": ["+callbacks=ema"],
    "clip, one_cycle": [
        "+callbacks=clip_gradients",
        "scheduler=one_cycle",
        "optimizer=sgd",
        "optimizer.momentum=0.9",
    ],
    "augmented, workers": [*AUGMENTED, "loader.workers=2"],
    "augmented": AUGMENTED,
    "plateau, early stop": [
        "scheduler=reduce_on_plateau",
        "+callbacks=early_stop",
        "optimizer=rmsprop",
        BACKGROUND,
    ],
    "accumulate, fp16": ["trainer.accumulate=3", *FP16],
    "accumulate, workers": [*AUGMENTED, "loader.workers=2", "trainer.accumulate=2"],
    "bad samples skipped": [
        *AUGMENTED,
        "data.spoiled=3",
        "callbacks.non_finite.policy=skip",
        BACKGROUND,
    ],
    "background": [BACKGROUND],
    "background, ema, fp16": [BACKGROUND, "+callbacks=ema", *FP16],
    "background, workers": [BACKGROUND, *AUGMENTED, "loader.workers=2"],
    "each step saved": [EACH_STEP],
    "each step, background": [EACH_STEP, BACKGROUND],
}


@fw.datasets.register("noisy_digits")
class NoisyDigits(fw.Data):
    """Digits that are read one by one, with random noise."""

    def __init__(self, image: bool = False, spoiled: fw.NonNegativeInt = 0):
        """Load the digits.

        Args:
            image: Use the shape (1, 8, 8) instead of (64,).
            spoiled: Number of training samples that are NaN.
        """
        digits = fw.datasets.build("digits", image=image)
        self.train = Noisy(digits.train, spoiled)
        self.val = digits.val
        self.test = digits.test
        self.in_shape = digits.in_shape
        self.out_shape = digits.out_shape
        self.classes = digits.classes


class Noisy(torch.utils.data.Dataset):
    def __init__(self, split: fw.TensorSplit, spoiled: int):
        self.split = split
        self.spoiled = spoiled

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = self.split[index]
        noise = 0.1 * torch.randn(inputs.shape)
        return inputs + (noise if index < len(self) - self.spoiled else torch.nan), target


class Progress(NamedTuple):
    """The last recorded progress of a run; times are those of the monotonic clock.

    Args:
        began: Time of the first step's start; 0 before it.
        step: The last complete step.
        saving: 1 while a checkpoint is written, otherwise 0.
        saved: The step of the newest checkpoint.
        unsaved: The most seconds of work that a new checkpoint added to the previous one.
        began_at: The step of the checkpoint from which the process resumed; 0 without one.
        ends: Time of each step's end.
    """

    began: float = 0.0
    step: float = 0.0
    saving: float = 0.0
    saved: float = 0.0
    unsaved: float = 0.0
    began_at: float = 0.0
    ends: tuple[float, ...] = (0.0,) * (STEPS + 1)

    def unsaved_at(self, now: float, step: float) -> float:
        """Return the seconds of work after a step; 0 if there is no later step."""
        return now - self.ends[int(step) + 1] if self.step > step else 0.0


@fw.callbacks.register("witness")
class Witness(fw.Callback):
    """Record the progress in memory that survives the process.

    It must be the first callback, so that it records a step before the step is saved.
    """

    changes_training = False
    only_main = True
    form = struct.Struct(f"{len(Progress._fields) + STEPS}d")
    memory = mmap.mmap(-1, form.size)
    ends = Progress._fields.index("ends")  # position of the first of them

    def on_fit_start(self, trainer: Trainer) -> None:
        self.note(step=trainer.state.step, saved=trainer.state.step, began_at=trainer.state.step)

    def on_step_start(self, trainer: Trainer) -> None:
        if not self.read().began:  # the start of workers, mostly longer than a fit, is excluded
            self.note(began=time.monotonic())

    def on_step_end(self, trainer: Trainer) -> None:
        position = self.ends + trainer.state.step
        struct.pack_into("d", self.memory, 8 * position, time.monotonic())
        self.note(step=trainer.state.step)

    @classmethod
    def note(cls, **values: float) -> None:
        for name, value in values.items():
            struct.pack_into("d", cls.memory, 8 * Progress._fields.index(name), value)

    @classmethod
    def read(cls) -> Progress:
        numbers = cls.form.unpack(cls.memory[:])
        return Progress(*numbers[: cls.ends], numbers[cls.ends :])

    @classmethod
    def forget(cls) -> None:
        cls.memory[:] = bytes(cls.form.size)


@dataclass
class Outcome:
    """The results of a run.

    Args:
        interval: Steps between checkpoints.
        resumed: Number of processes that resumed from a checkpoint.
        unsaved: The most seconds of work that were unsaved before a save.
    """

    name: str
    interval: int
    background: bool
    kills: int = 0
    resumed: int = 0
    in_saves: int = 0
    most_lost: int = 0
    seconds_lost: float = 0.0
    unsaved: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def killed(self, run: Path, progress: Progress) -> None:
        """Record the cost of a kill; every checkpoint with a final name must be readable."""
        now = time.monotonic()
        self.kills += 1
        self.in_saves += progress.saving > 0
        self.unsaved = max(self.unsaved, progress.unsaved)
        newest = 0
        for saved in listed(run / "checkpoints"):
            try:
                load(saved)
                newest = step_of(saved)
            except CheckpointError as error:
                self.wrong.append(f"unreadable under a final name: {error}")
        lost = int(progress.step) - newest
        seconds = progress.unsaved_at(now, newest)
        self.most_lost = max(self.most_lost, lost)
        self.seconds_lost = max(self.seconds_lost, seconds)
        if lost > self.interval and not (self.background and seconds <= UNSAVED * self.unsaved):
            unsaved = f"at most {self.unsaved:.2f} s were unsaved before"
            self.wrong.append(f"lost {lost} steps, {seconds:.2f} s; {unsaved}")

    def __str__(self) -> str:
        verdict = "; ".join(dict.fromkeys(self.wrong)) or "equal"
        age = f", {self.seconds_lost:.2f} s" if self.background else ""
        counts = f"{self.kills:3} kills ({self.in_saves:2} in saves), {self.resumed:2} resumes"
        counts += f"  lost {self.most_lost:2} steps{age}"
        return f"{self.name:<34} {counts}  {verdict}"


def choose(number: int, root: Path) -> tuple[str, list[str]]:
    """Return the name and overrides of a run: the next pair of model and variant, a new seed."""
    model = list(MODELS)[number % len(MODELS)]
    variant = list(VARIANTS)[number % len(VARIANTS)]  # 13 and 16 are coprime: all pairs occur
    overrides = [
        f"run.root={root}",
        f"seed={number}",
        f"trainer.max_steps={STEPS}",
        "trainer.max_epochs=null",
        "trainer.validate_every=10steps",
        "trainer.log_every=5steps",
        "loader.batch_size=64",
        "resume=auto",
        "callbacks=[witness,checkpoint,non_finite,gradient_norm]",
        f"callbacks.checkpoint.every={EVERY}steps",
        "callbacks.checkpoint.background=false",
    ]
    overrides += [override.replace("{root}", str(root)) for override in MODELS[model]]
    for override in VARIANTS[variant]:
        if model not in OWN_DATA or not override.startswith("data"):
            overrides.append(override)
    return f"{model}, {variant}", overrides


def prepare(root: Path) -> None:
    """Write the inputs of some runs: texts of different lengths, a series, a trained teacher."""
    words = ["yes", "no", "perhaps", "never", "always"]
    chance = random.Random(0)
    lines = ["text,label"]
    for _ in range(400):
        text = " ".join(chance.choices(words, k=chance.randint(1, 30)))
        label = "even" if text.count("yes") % 2 == 0 else "odd"
        lines.append(f"{text},{label}")
    (root / "texts.csv").write_text("\n".join(lines), encoding="utf-8")
    loads = [f"{hour % 24 + chance.random():.3f}" for hour in range(900)]
    (root / "series.csv").write_text("\n".join(["load", *loads]))
    teacher = spec_of([*choose(0, root)[1], "run.name=teacher"])
    if status_of(fork(lambda: train_or_resume(teacher))) != 0:
        raise RunError("the teacher's run failed")


def train_or_resume(spec: Spec, forget: bool = False) -> None:
    """Train or resume a run.

    Args:
        spec: The run.
        forget: Resume without the random state and the optimizer's state.
    """
    torch.set_num_threads(1)
    note_saves()
    if forget:
        restore = Trainer.load_state_dict

        def without_state(self: Trainer, saved: dict[str, Any]) -> None:
            fresh = self.state_dict()
            optimizer = saved["optimizer"] | {"state": fresh["optimizer"]["state"]}
            restore(self, saved | {"random": fresh["random"], "optimizer": optimizer})

        setattr(Trainer, "load_state_dict", without_state)  # noqa: B010  # mypy rejects `=`
    train(spec, "campaign", [], say=lambda line: None)


def note_saves() -> None:
    """Record the time between the beginning of a checkpoint and its final name."""
    write = writing.write
    publish = writing.publish
    make_hidden = sharded.make_hidden

    def noted_folder(*arguments: Any) -> None:
        make_hidden(*arguments)
        Witness.note(saving=1)

    def noted_write(*arguments: Any) -> None:
        Witness.note(saving=1)
        write(*arguments)

    def noted_publish(*arguments: Any) -> Path:
        final = publish(*arguments)
        progress = Witness.read()
        unsaved = progress.unsaved_at(time.monotonic(), progress.saved)
        Witness.note(
            unsaved=max(progress.unsaved, unsaved),
            saved=step_of(final),
            saving=0,
        )
        return final

    vars(writing).update(write=noted_write, publish=noted_publish)
    vars(sharded).update(make_hidden=noted_folder, publish=noted_publish)


def campaign_run(
    number: int, kills: int, root: Path, chance: random.Random, forget: bool
) -> Outcome:
    """Train a run undisturbed, then again with kills, and compare."""
    name, overrides = choose(number, root)
    outcome = Outcome(name, 1 if EACH_STEP in overrides else EVERY, BACKGROUND in overrides)
    undisturbed = root / f"campaign/{number}-whole"
    run = root / f"campaign/{number}-killed"
    undisturbed_spec = spec_of([*overrides, f"run.name={undisturbed.name}"])
    killed_spec = spec_of([*overrides, f"run.name={run.name}"])
    Witness.forget()
    if status_of(fork(lambda: train_or_resume(undisturbed_spec))) != 0:
        outcome.wrong.append("the undisturbed run failed")
        return outcome
    seconds = time.monotonic() - Witness.read().began
    outcome.unsaved = Witness.read().unsaved
    restarts = 5  # limit of the restarts that produce a kill after a checkpoint
    while True:
        Witness.forget()
        child = fork(lambda: train_or_resume(killed_spec, forget))
        if outcome.kills < kills:
            kill_after(child, chance.uniform(-seconds / 100, 1.5 * seconds / kills))
        elif outcome.resumed == 0 and steps_to_resume(run) == []:
            kill_after_save(child)
        status = status_of(child)
        outcome.resumed += Witness.read().began_at > 0
        if status == -signal.SIGKILL:
            outcome.killed(run, Witness.read())
        elif status != 0:
            outcome.wrong.append("a resumed run failed")
            return outcome
        elif outcome.resumed == 0 and restarts > 0:
            shutil.rmtree(run)  # it ended before a kill that leaves a checkpoint
            restarts -= 1
        elif outcome.kills >= kills or done(run):
            break
    if outcome.resumed == 0:
        outcome.wrong.append("never resumed from a checkpoint")
    outcome.wrong += differences(undisturbed, run)
    return outcome


def kill_after(child: int, seconds: float) -> None:
    """Kill a process and its children, unless it ends before.

    Args:
        child: The process.
        seconds: Time after the start of the training; a negative number is a time before it.
    """
    forked = time.monotonic()
    while seconds >= 0 or time.monotonic() < forked - 10 * seconds:
        began = Witness.read().began
        if began and seconds >= 0 and time.monotonic() >= began + seconds:
            break
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)
    kill(child)


def steps_to_resume(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints from which it can resume."""
    return [step for step in map(step_of, listed(run / "checkpoints")) if 0 < step < STEPS]


def kill_after_save(child: int) -> None:
    """Kill a process and its children after its first checkpoint, unless it ends before."""
    while Witness.read().saved == 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)
    kill(child)


def kill(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # its process group does not exist yet
        os.kill(child, signal.SIGKILL)


def kills(runs: int, per_run: int, seed: int, control: bool) -> int:
    """Run the campaign and return its exit status.

    Args:
        runs: Number of runs.
        per_run: Number of kills of each run.
        seed: Seed of the times of the kills.
        control: Resume without the random state and the optimizer's state.
    """
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    began = time.monotonic()
    chance = random.Random(seed)
    outcomes: list[Outcome] = []
    killed = 0
    prepare(root)
    for number in range(runs):
        missing = per_run * (number + 1) - killed  # an earlier run may have ended too soon
        outcome = campaign_run(number, missing, root, chance, control)
        killed += outcome.kills
        outcomes.append(outcome)
        print(f"{number:3} {outcome}", flush=True)
    survived = sum(not outcome.wrong for outcome in outcomes)
    in_saves = sum(outcome.in_saves for outcome in outcomes)
    resumed = [outcome.resumed for outcome in outcomes]
    print(f"{survived} of {runs} runs bitwise equal after {killed} kills, {in_saves} inside saves;")
    print(f"{sum(resumed)} resumes from a checkpoint, {min(resumed)} or more of each run")
    print(*losses(outcomes), sep="\n")
    keep = survived != runs and not control
    print(f"  {time.monotonic() - began:.0f} s" + (f"; the runs are in {root}" if keep else ""))
    if not keep:
        shutil.rmtree(root)
    if control and survived:
        print("the control did not fail for each run")
    return int(survived != runs)


def losses(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the lost steps for each kind of saves."""
    groups: dict[tuple[bool, int], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.background, outcome.interval), []).append(outcome)
    for (background, interval), group in sorted(groups.items()):
        lost = max(outcome.most_lost for outcome in group)
        line = f"at most {lost} steps repeated, with a checkpoint every {interval}"
        if not background:
            yield f"  {len(group)} saved between steps: {line} (allowed: one interval)"
            continue
        seconds = max(outcome.seconds_lost for outcome in group)
        unsaved = max(outcome.unsaved for outcome in group)
        yield (
            f"  {len(group)} saved in the background: {line} ({seconds:.2f} s of work; allowed: "
            f"one interval, or {UNSAVED} times the run's longest unsaved work, "
            f"at most {unsaved:.2f} s)"
        )


def double_start(number: int, resumed: bool, expected: Path) -> list[str]:
    """Start a run twice at the same time, as a first start or after a kill; return the problems.

    One process must train it, and the other must be refused.
    """
    run = expected.with_name(f"double-{number}")
    spec = spec_of([*choose(0, expected.parent.parent)[1], f"run.name={run.name}"])
    if resumed:
        Witness.forget()
        first = fork(lambda: train_or_resume(spec))
        while Witness.read().step < 2 * EVERY:
            time.sleep(0.0005)
        kill(first)
        status_of(first)
    read_end, write_end = os.pipe()

    def wait_and_train() -> None:
        os.read(read_end, 1)
        try:
            train_or_resume(spec)
        except RunError as error:
            refusals = ("is being written by", "exists already", "already exists")
            if not any(refusal in str(error) for refusal in refusals):
                raise
            os._exit(REFUSED)

    children = [fork(wait_and_train) for _ in range(2)]
    os.write(write_end, b"go")
    ended = sorted(status_of(child) for child in children)
    os.close(read_end)
    os.close(write_end)
    if ended != [0, REFUSED]:
        return [f"the two processes ended with {ended}"]
    return list(differences(expected, run))


def double_starts(times: int) -> int:
    """Start runs twice at the same time, half of them as resumes; return the exit status."""
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    expected = root / "campaign/whole"
    spec = spec_of([*choose(0, root)[1], f"run.name={expected.name}"])
    status_of(fork(lambda: train_or_resume(spec)))
    correct = {"first start": 0, "resume": 0}
    for number in range(times):
        kind = "resume" if number % 2 else "first start"
        problems = double_start(number, kind == "resume", expected)
        correct[kind] += not problems
        for problem in problems:
            print(f"{number:3} {kind}: {problem}")
    resumes = times // 2
    print(
        f"one writer in {correct['first start']} of {times - resumes} double first starts "
        f"and {correct['resume']} of {resumes} double resumes;"
    )
    print("the other process was refused, and the result equals that of a single process")
    shutil.rmtree(root)
    return int(sum(correct.values()) != times)
