"""Damages the files of real checkpoints: whatever is damaged must be found before it is used."""

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from campaign_runs import spec_of

from framework.errors import CheckpointError
from framework.experiment.experiment import train
from framework.runs.checkpoint import FILES, listed, load, newest, read_manifest, reading, verify

PAGE = 4096
MODELS = {  # of different sorts: buffers, a schedule's state, a scaler, averages
    "mlp": ["model=mlp", "model.width=64", "+callbacks=ema"],
    "cnn": ["model=cnn", "model.channels=[8,16]", "data.image=true", "trainer.precision=fp16"],
    "transformer": [
        "model=transformer",
        "model.width=32",
        "data.image=true",
        "scheduler=reduce_on_plateau",
    ],
}
Damage = tuple[str, str, bytes]  # what was done, to which file, and what it is now


def trained(name: str, root: Path) -> Path:
    """Train for a few steps and return the folder with its two checkpoints."""
    limits = [
        "trainer.max_steps=6",
        "trainer.max_epochs=null",
        "trainer.validate_every=6steps",
        "loader.batch_size=64",
    ]
    saving = [
        "callbacks=[checkpoint]",
        "callbacks.checkpoint.every=3steps",
        "loggers=[]",
        f"run.root={root}",
    ]
    result = train(
        spec_of([*MODELS[name], *limits, *saving, f"run.name={name}"]),
        "files",
        [],
        say=lambda line: None,
    )
    return result.folder / "checkpoints"


class Originals:
    """The files of one checkpoint as they were, to damage copies of their contents."""

    def __init__(self, written: Path, chance: random.Random):
        self.contents = {name: (written / name).read_bytes() for name in FILES}
        self.sizes = [len(content) for content in self.contents.values()]
        self.chance = chance

    def flips(self, count: int) -> Iterator[Damage]:
        """Flip one bit each time: half of them anywhere, by size, and half in each file in turn."""
        for number in range(count):
            (anywhere,) = self.chance.choices(FILES, self.sizes)
            name = anywhere if number % 2 else FILES[number // 2 % len(FILES)]
            damaged = bytearray(self.contents[name])
            damaged[self.chance.randrange(len(damaged))] ^= 1 << self.chance.randrange(8)
            yield "flipped bit", name, bytes(damaged)

    def pages(self, count: int) -> Iterator[Damage]:
        """Fill a page of 4 KiB with zeros, one that was not all zero."""
        starts = [
            (name, at)
            for name, content in self.contents.items()
            for at in range(0, len(content), PAGE)
        ]
        whole = [(name, at) for name, at in starts if any(self.contents[name][at : at + PAGE])]
        for name, at in self.chance.choices(whole, k=count):
            content = self.contents[name]
            yield (
                "zeroed page",
                name,
                content[:at] + bytes(len(content[at : at + PAGE])) + content[at + PAGE :],
            )

    def cuts(self, count: int) -> Iterator[Damage]:
        """Cut each file in turn, to nothing at first and then to any length."""
        in_turn = self.chance.sample(FILES, len(FILES))
        for number in range(count):
            name = in_turn[number % len(FILES)]
            length = 0 if number < len(FILES) else self.chance.randrange(len(self.contents[name]))
            yield "truncation", name, self.contents[name][:length]


def undetected(folder: Path, name: str, content: bytes) -> Iterator[str]:
    """Yield what is wrong when the newest checkpoint has such a file: it must be refused, and the one before found."""
    *_, older, damaged = listed(folder)
    whole = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content)
    try:
        for use in (verify, load):
            try:
                use(damaged)
            except CheckpointError as error:
                if name not in str(error):
                    yield f"{use.__name__} does not name {name}: {error}"
            else:
                yield f"{use.__name__} takes it"
        found, skipped = newest(folder)
        if found != older:
            yield f"{found} is taken for the newest good one"
        elif len(skipped) != 1 or str(damaged) not in skipped[0]:
            yield f"why it was skipped is not said: {skipped}"
    finally:
        (damaged / name).write_bytes(whole)


def damage(
    folder: Path, counts: list[int], chance: random.Random
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Flip, zero and cut so many times; return the counts by (sort, file), and of each that goes undetected why."""
    originals = Originals(listed(folder)[-1], chance)
    kinds: list[Callable[[int], Iterator[Damage]]] = [
        originals.flips,
        originals.pages,
        originals.cuts,
    ]
    done: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    for make, count in zip(kinds, counts, strict=True):
        for what, name, content in make(count):
            done[what, name] += 1
            if reasons := list(undetected(folder, name, content)):
                wrong.append(f"{what} in {name}: {'; '.join(reasons)}")
    verify(listed(folder)[-1])  # or the harness has done damage of its own
    return done, wrong


def share(total: int, number: int) -> int:
    """Return how many of them fall to one of the models."""
    return total // len(MODELS) + (number < total % len(MODELS))


def files(flips: int, seed: int, control: bool) -> int:
    """Run the campaign, with a tenth as many zeroed pages and a twentieth as many truncations; return the exit status.

    control: look at nothing but the manifests.
    """
    if control:
        reading.verify = lambda checkpoint, **_: read_manifest(checkpoint)
    chance, total, wrong = random.Random(seed), Counter[tuple[str, str]](), list[str]()
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        for number, model in enumerate(MODELS):
            counts = [share(of, number) for of in (flips, round(flips / 10), round(flips / 20))]
            done, found = damage(trained(model, Path(root)), counts, chance)
            total, wrong = total + done, wrong + [f"{model}: {each}" for each in found]
    for what in dict.fromkeys(what for what, _ in total):
        by_file = ", ".join(f"{total[what, name]} in {name}" for name in FILES)
        print(f"{sum(total[what, name] for name in FILES):5} x {what:<12} ({by_file})")
    for each in wrong[:20]:
        print(f"UNDETECTED {each}")
    print(
        f"{len(wrong)} undetected of {total.total()} damages to real checkpoints of {len(MODELS)} models"
    )
    return int(bool(wrong))
