"""Kills training runs at random moments, or starts them twice at once, and compares them with undisturbed ones."""

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
from framework.runs.checkpoint import listed, load, step_of, writing
from framework.training.trainer import Trainer

STEPS = 60
EVERY = 4  # steps between checkpoints, where a twist says nothing else
UNSAVED = 3  # in the background, how many times as much work may be lost as was ever unsaved before a save, in seconds
REFUSED = 3  # exit status of a process that may not write

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
    ],
}
MODELS["transformer"] += ["data.image=true"]
MODELS |= {  # other tasks: two updates a step, draws of codes, views of inputs, values beside the loss, a teacher
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
OWN_DATA = {  # texts of unequal length in pools, windows of a long text, tables, series
    "text": ["data=text_table", "data.path={root}/texts.csv", "model=text_lstm", "model.width=8"],
    "language": [
        "data=stdlib_source",
        "data.characters=60000",
        "data.length=32",
        "task=language_modelling",
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
    ],
}
OWN_DATA["language"] += [
    "model=decoder",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "metrics=[]",
]
OWN_DATA["series"] += ["task=regression", "metrics=[mae]", "model=linear_forecast"]
MODELS |= OWN_DATA
BACKGROUND, EACH_STEP = "callbacks.checkpoint.background=true", "callbacks.checkpoint.every=1steps"
AUGMENTED, FP16 = ["data=noisy_digits"], ["trainer.precision=fp16"]
TWISTS = {
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
    """Digits that are read one by one, each with noise of its own."""

    def __init__(self, image: bool = False, spoiled: fw.NonNegativeInt = 0):
        """Take the digits as they are, or spoil some.

        Args:
            image: (1, 8, 8) instead of (64,).
            spoiled: how many training samples are NaN.
        """
        digits = fw.datasets.build("digits", image=image)
        self.train, self.val, self.test = Noisy(digits.train, spoiled), digits.val, digits.test
        self.in_shape, self.out_shape, self.classes = (
            digits.in_shape,
            digits.out_shape,
            digits.classes,
        )


class Noisy(torch.utils.data.Dataset):
    def __init__(self, split: fw.TensorSplit, spoiled: int):
        self.split, self.spoiled = split, spoiled

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = self.split[index]
        noise = 0.1 * torch.randn(inputs.shape)
        return inputs + (noise if index < len(self) - self.spoiled else torch.nan), target


class Sight(NamedTuple):
    """Where a run was when it was last seen; times are those of the monotonic clock."""

    began: float = 0.0  # when its first step did; 0: it had not come to it
    step: float = 0.0  # the last whole one
    saving: float = 0.0  # 1: a checkpoint was being written
    saved: float = 0.0  # the step of the newest checkpoint
    unsaved: float = (
        0.0  # seconds of work since then, at most, at the moment when the next one was there
    )
    began_at: float = 0.0  # the step of the checkpoint that it went on from; 0: none
    ends: tuple[float, ...] = (0.0,) * (STEPS + 1)  # when each step ended

    def unsaved_at(self, now: float, step: float) -> float:
        """Return for how many seconds the work after a step has been there; 0 when there is none."""
        return now - self.ends[int(step) + 1] if self.step > step else 0.0


@fw.callbacks.register("witness")
class Witness(fw.Callback):
    """Keeps in memory that survives the run where it stands. It is the first callback, so that no save comes before."""

    changes_training = False
    form = struct.Struct(f"{len(Sight._fields) + STEPS}d")
    memory = mmap.mmap(-1, form.size)
    ends = Sight._fields.index("ends")  # where those begin

    def on_fit_start(self, trainer: Trainer) -> None:
        self.note(step=trainer.state.step, saved=trainer.state.step, began_at=trainer.state.step)

    def on_step_start(self, trainer: Trainer) -> None:
        if not self.read().began:  # not before: most of a short life would be workers that start
            self.note(began=time.monotonic())

    def on_step_end(self, trainer: Trainer) -> None:
        struct.pack_into(
            "d",
            self.memory,
            8 * (Sight._fields.index("ends") + trainer.state.step),
            time.monotonic(),
        )
        self.note(step=trainer.state.step)

    @classmethod
    def note(cls, **seen: float) -> None:
        for name, value in seen.items():
            struct.pack_into("d", cls.memory, 8 * Sight._fields.index(name), value)

    @classmethod
    def read(cls) -> Sight:
        numbers = cls.form.unpack(cls.memory[:])
        return Sight(*numbers[: cls.ends], numbers[cls.ends :])

    @classmethod
    def forget(cls) -> None:
        cls.memory[:] = bytes(cls.form.size)


@dataclass
class Outcome:
    """What became of a run."""

    name: str
    interval: int  # steps between checkpoints
    background: bool
    kills: int = 0
    resumed: int = 0  # lives that began from a checkpoint
    in_saves: int = 0
    most_lost: int = 0
    seconds_lost: float = 0.0
    unsaved: float = 0.0  # the most seconds of work that were unsaved before a save
    wrong: list[str] = field(default_factory=list)

    def killed(self, run: Path, seen: Sight) -> None:
        """Note what a kill has cost; every checkpoint under a final name must be readable."""
        now = time.monotonic()
        self.kills += 1
        self.in_saves += seen.saving > 0
        self.unsaved = max(self.unsaved, seen.unsaved)
        newest = 0
        for saved in listed(run / "checkpoints"):
            try:
                load(saved)
                newest = step_of(saved)
            except CheckpointError as error:
                self.wrong.append(f"unreadable under a final name: {error}")
        lost, seconds = int(seen.step) - newest, seen.unsaved_at(now, newest)
        self.most_lost, self.seconds_lost = (
            max(self.most_lost, lost),
            max(self.seconds_lost, seconds),
        )
        if lost > self.interval and not (self.background and seconds <= UNSAVED * self.unsaved):
            self.wrong.append(
                f"lost {lost} steps, {seconds:.2f} s, after {self.unsaved:.2f} s at most were unsaved"
            )

    def __str__(self) -> str:
        verdict = "; ".join(dict.fromkeys(self.wrong)) or "equal"
        age = f", {self.seconds_lost:.2f} s" if self.background else ""
        counts = f"{self.kills:3} kills ({self.in_saves:2} in saves), {self.resumed:2} resumes"
        counts += f"  lost {self.most_lost:2} steps{age}"
        return f"{self.name:<34} {counts}  {verdict}"


def choose(number: int, root: Path) -> tuple[str, list[str]]:
    """Return the name and overrides of a run: all pairs of model and twist in turn, each with a seed of its own."""
    model = list(MODELS)[number % len(MODELS)]
    twist = list(TWISTS)[
        number % len(TWISTS)
    ]  # 13 and 16 have no divisor in common: all pairs come up
    own = [word.replace("{root}", str(root)) for word in MODELS[model]]
    twisted = [
        word for word in TWISTS[twist] if model not in OWN_DATA or not word.startswith("data")
    ]
    fixed = [
        f"run.root={root}",
        f"seed={number}",
        f"trainer.max_steps={STEPS}",
        "trainer.max_epochs=null",
    ]
    fixed += [
        "trainer.validate_every=10steps",
        "trainer.log_every=5steps",
        "loader.batch_size=64",
        "resume=auto",
    ]
    fixed += [
        "callbacks=[witness,checkpoint,non_finite,gradient_norm]",
        f"callbacks.checkpoint.every={EVERY}steps",
    ]
    fixed += ["callbacks.checkpoint.background=false"]
    return f"{model}, {twist}", [*fixed, *own, *twisted]


def provide(root: Path) -> None:
    """Make what some of the runs read: a teacher, texts of unequal length, a series."""
    words, chance = ["yes", "no", "perhaps", "never", "always"], random.Random(0)
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 30))) for _ in range(400)]
    lines = [f"{text},{'even' if text.count('yes') % 2 == 0 else 'odd'}" for text in texts]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    (root / "series.csv").write_text(
        "\n".join(["load", *(f"{hour % 24 + chance.random():.3f}" for hour in range(900))])
    )
    teacher = spec_of([*choose(0, root)[1], "run.name=teacher"])
    if status_of(fork(lambda: live(teacher))) != 0:
        raise RunError("the teacher's run failed")


def live(spec: Spec, forget: bool = False) -> None:
    """Train, or go on; forget: without the random state and what the optimizer keeps, which not all runs have."""
    torch.set_num_threads(1)
    note_saves()
    if forget:
        whole = Trainer.load_state_dict

        def without(self: Trainer, saved: dict[str, Any]) -> None:
            fresh = self.state_dict()
            optimizer = saved["optimizer"] | {"state": fresh["optimizer"]["state"]}
            whole(self, saved | {"random": fresh["random"], "optimizer": optimizer})

        setattr(Trainer, "load_state_dict", without)  # noqa: B010 (a method is not assigned to)
    train(spec, "campaign", [], say=lambda line: None)


def note_saves() -> None:
    """Let the witness know while the files of a checkpoint are written and get their name."""
    write, publish = writing.write, writing.publish

    def noted_write(*arguments: Any) -> None:
        Witness.note(saving=1)
        write(*arguments)

    def noted_publish(*arguments: Any) -> Path:
        final, seen = publish(*arguments), Witness.read()
        Witness.note(
            unsaved=max(seen.unsaved, seen.unsaved_at(time.monotonic(), seen.saved)),
            saved=step_of(final),
            saving=0,
        )
        return final

    vars(writing).update(write=noted_write, publish=noted_publish)


def campaign_run(
    number: int, kills: int, root: Path, chance: random.Random, forget: bool
) -> Outcome:
    """Run once undisturbed, then the same with kills, and compare."""
    name, overrides = choose(number, root)
    outcome = Outcome(name, 1 if EACH_STEP in overrides else EVERY, BACKGROUND in overrides)
    whole, run = (root / f"campaign/{number}-{kind}" for kind in ("whole", "killed"))
    undisturbed, killed = (spec_of([*overrides, f"run.name={path.name}"]) for path in (whole, run))
    Witness.forget()
    if status_of(fork(lambda: live(undisturbed))) != 0:
        outcome.wrong.append("the undisturbed run failed")
        return outcome
    took, outcome.unsaved = time.monotonic() - Witness.read().began, Witness.read().unsaved
    anew = 5  # times that a run may begin anew to get such a kill
    while True:
        Witness.forget()
        child = fork(lambda: live(killed, forget))
        if outcome.kills < kills:
            kill_after(child, chance.uniform(-took / 100, 1.5 * took / kills))
        elif outcome.resumed == 0 and listed_steps(run) == []:
            kill_after_save(child)
        status = status_of(child)
        outcome.resumed += Witness.read().began_at > 0
        if status == -signal.SIGKILL:
            outcome.killed(run, Witness.read())
        elif status != 0:
            outcome.wrong.append("a resumed run failed")
            return outcome
        elif outcome.resumed == 0 and anew > 0:
            shutil.rmtree(run)  # it ended before a kill that leaves a checkpoint
            anew -= 1
        elif outcome.kills >= kills or done(run):
            break
    if outcome.resumed == 0:
        outcome.wrong.append("no life began from a checkpoint")
    outcome.wrong += differences(whole, run)
    return outcome


def kill_after(child: int, seconds: float) -> None:
    """Kill a process and its children so long after its training began, or, for less than 0, before that, unless it
    has ended by itself."""
    forked = time.monotonic()
    while seconds >= 0 or time.monotonic() < forked - 10 * seconds:
        began = Witness.read().began
        if began and seconds >= 0 and time.monotonic() >= began + seconds:
            break
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)
    kill(child)


def listed_steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints that a life can go on from."""
    return [step for step in map(step_of, listed(run / "checkpoints")) if 0 < step < STEPS]


def kill_after_save(child: int) -> None:
    """Kill a process and its children as soon as it has saved a checkpoint, unless it has ended by itself."""
    while Witness.read().saved == 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)
    kill(child)


def kill(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet
        os.kill(child, signal.SIGKILL)


def kills(runs: int, each: int, seed: int, control: bool) -> int:
    """Run the campaign and return its exit status. control: resume without the random state and the optimizer's."""
    root, began, chance = (
        Path(tempfile.mkdtemp(prefix="campaign-")),
        time.monotonic(),
        random.Random(seed),
    )
    outcomes: list[Outcome] = []
    provide(root)
    for number in range(runs):
        owed = each * (number + 1) - sum(
            o.kills for o in outcomes
        )  # a run may end before it has had its share
        outcomes.append(campaign_run(number, owed, root, chance, control))
        print(f"{number:3} {outcomes[-1]}", flush=True)
    survived, killed = sum(not o.wrong for o in outcomes), sum(o.kills for o in outcomes)
    in_saves = sum(o.in_saves for o in outcomes)
    resumed, fewest = sum(o.resumed for o in outcomes), min(o.resumed for o in outcomes)
    print(
        f"{survived} of {runs} runs bitwise equal after {killed} kills, {in_saves} of them inside saves;"
    )
    print(f"{resumed} lives began from a checkpoint, {fewest} or more of each run")
    print(*losses(outcomes), sep="\n")
    keep = survived != runs and not control
    print(f"  {time.monotonic() - began:.0f} s" + (f"; the runs are in {root}" if keep else ""))
    if not keep:
        shutil.rmtree(root)
    if control and survived:
        print("the control did not fail for each run")
    return int(survived != runs)


def losses(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield how much was done again, for each manner of saving."""
    for background, every in sorted({(o.background, o.interval) for o in outcomes}):
        found = [o for o in outcomes if (o.background, o.interval) == (background, every)]
        done_again = f"at most {max(o.most_lost for o in found)} steps done again, with a checkpoint every {every}"
        allowed = "(allowed: one interval)"
        if background:
            most, unsaved = max(o.seconds_lost for o in found), max(o.unsaved for o in found)
            allowed = f"({most:.2f} s of work; allowed: one interval and what waits to be written, {UNSAVED} times the "
            allowed += f"work that was unsaved in lives of the same run, {unsaved:.2f} s at most)"
        yield f"  {len(found)} saved {'in the background' if background else 'between steps'}: {done_again} {allowed}"


def double_start(number: int, resumed: bool, whole: Path) -> list[str]:
    """Start one run twice at the same moment, at its beginning or after a kill; return what is wrong.

    One process must train it, and the other be refused.
    """
    run = whole.with_name(f"double-{number}")
    spec = spec_of([*choose(0, whole.parent.parent)[1], f"run.name={run.name}"])
    if resumed:
        Witness.forget()
        first = fork(lambda: live(spec))
        while Witness.read().step < 2 * EVERY:
            time.sleep(0.0005)
        kill(first)
        status_of(first)
    start, begun = os.pipe()

    def wait_and_live() -> None:
        os.read(start, 1)
        try:
            live(spec)
        except RunError as error:
            if not any(words in str(error) for words in ("is being written by", "exists already")):
                raise
            os._exit(REFUSED)

    children = [fork(wait_and_live) for _ in range(2)]
    os.write(begun, b"go")
    ended = sorted(status_of(child) for child in children)
    for descriptor in (start, begun):
        os.close(descriptor)
    if ended != [0, REFUSED]:
        return [f"the two processes ended with {ended}"]
    return list(differences(whole, run))


def double_starts(times: int) -> int:
    """Start runs twice at once, half of them at their beginning and half at their resume; return the exit status."""
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    whole = root / "campaign/whole"
    status_of(fork(lambda: live(spec_of([*choose(0, root)[1], f"run.name={whole.name}"]))))
    right = {False: 0, True: 0}
    for number in range(times):
        resumed = number % 2 == 1
        wrong = double_start(number, resumed, whole)
        right[resumed] += not wrong
        for each in wrong:
            print(f"{number:3} {'resume' if resumed else 'first start'}: {each}")
    firsts, resumes = times - times // 2, times // 2
    print(
        f"one writer in {right[False]} of {firsts} double first starts and {right[True]} of {resumes} double resumes;"
    )
    print("the other process was refused, and the run came to what it comes to alone, bit for bit")
    shutil.rmtree(root)
    return int(sum(right.values()) != times)
