"""Damage the files of real checkpoints, and check that each damage is detected before use."""

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
MODELS = {  # with buffers, a scheduler's state, a scaler, averages
    "mlp": ["model=mlp", "model.width=64", "+callbacks=ema"],
    "cnn": ["model=cnn", "model.channels=[8,16]", "data.image=true", "trainer.precision=fp16"],
    "transformer": [
        "model=transformer",
        "model.width=32",
        "data.image=true",
        "scheduler=reduce_on_plateau",
    ],
}
Damage = tuple[str, str, bytes]  # kind of the damage, name of the file, its new content


def trained(name: str, root: Path) -> Path:
    """Train for a few steps and return the folder with two checkpoints."""
    overrides = [
        *MODELS[name],
        "trainer.max_steps=6",
        "trainer.max_epochs=null",
        "trainer.validate_every=6steps",
        "loader.batch_size=64",
        "callbacks=[checkpoint]",
        "callbacks.checkpoint.every=3steps",
        "loggers=[]",
        f"run.root={root}",
        f"run.name={name}",
    ]
    result = train(spec_of(overrides), "files", [], say=lambda line: None)
    return result.folder / "checkpoints"


class Originals:
    """The original files of a checkpoint, and damaged copies of their contents."""

    def __init__(self, written: Path, chance: random.Random):
        self.contents = {name: (written / name).read_bytes() for name in FILES}
        self.sizes = [len(content) for content in self.contents.values()]
        self.chance = chance

    def flips(self, count: int) -> Iterator[Damage]:
        """Flip one bit each time: half of them at any byte, and half in each file in turn."""
        for number in range(count):
            (anywhere,) = self.chance.choices(FILES, self.sizes)
            name = anywhere if number % 2 else FILES[number // 2 % len(FILES)]
            damaged = bytearray(self.contents[name])
            damaged[self.chance.randrange(len(damaged))] ^= 1 << self.chance.randrange(8)
            yield "flipped bit", name, bytes(damaged)

    def pages(self, count: int) -> Iterator[Damage]:
        """Fill a page of 4 KiB with zeros; it contains other bytes before."""
        pages: list[tuple[str, int]] = []
        for name, content in self.contents.items():
            starts = range(0, len(content), PAGE)
            pages += [(name, start) for start in starts if any(content[start : start + PAGE])]
        for name, start in self.chance.choices(pages, k=count):
            damaged = bytearray(self.contents[name])
            end = min(start + PAGE, len(damaged))
            damaged[start:end] = bytes(end - start)
            yield "zeroed page", name, bytes(damaged)

    def cuts(self, count: int) -> Iterator[Damage]:
        """Truncate each file in turn, first to length 0 and then to random lengths."""
        in_turn = self.chance.sample(FILES, len(FILES))
        for number in range(count):
            name = in_turn[number % len(FILES)]
            length = 0 if number < len(FILES) else self.chance.randrange(len(self.contents[name]))
            yield "truncation", name, self.contents[name][:length]


def undetected(folder: Path, name: str, content: bytes) -> Iterator[str]:
    """Yield the problems when a file of the newest checkpoint has that content.

    This checkpoint must be refused, and the previous one must be selected.
    """
    *_, older, damaged = listed(folder)
    original = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content)
    try:
        for use in (verify, load):
            try:
                use(damaged)
            except CheckpointError as error:
                if name not in str(error):
                    yield f"{use.__name__} does not name {name}: {error}"
            else:
                yield f"{use.__name__} accepts it"
        found, skipped = newest(folder)
        if found != older:
            yield f"{found} is selected as the newest good one"
        elif len(skipped) != 1 or str(damaged) not in skipped[0]:
            yield f"expected one reason that names {damaged}, got {skipped}"
    finally:
        (damaged / name).write_bytes(original)


def damage(
    folder: Path, counts: list[int], chance: random.Random
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Cause `counts` flips, zeroed pages and truncations.

    Returns:
        The number of damages by kind and file, and a message for each undetected one.
    """
    originals = Originals(listed(folder)[-1], chance)
    kinds: list[Callable[[int], Iterator[Damage]]] = [
        originals.flips,
        originals.pages,
        originals.cuts,
    ]
    done: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    for make, count in zip(kinds, counts, strict=True):
        for kind, name, content in make(count):
            done[kind, name] += 1
            if reasons := list(undetected(folder, name, content)):
                wrong.append(f"{kind} in {name}: {'; '.join(reasons)}")
    verify(listed(folder)[-1])  # the campaign itself has damaged nothing
    return done, wrong


def share(total: int, number: int) -> int:
    """Return the share of one of the models in a total number."""
    return total // len(MODELS) + (number < total % len(MODELS))


def files(flips: int, seed: int, control: bool) -> int:
    """Run the campaign and return its exit status.

    Args:
        flips: Number of flipped bits; there are a tenth as many zeroed pages and a twentieth as
            many truncations.
        seed: Seed of the damages.
        control: Check only the manifests.
    """
    if control:
        reading.verify = lambda checkpoint, **_: read_manifest(checkpoint)
    chance = random.Random(seed)
    total: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        for number, model in enumerate(MODELS):
            totals = (flips, round(flips / 10), round(flips / 20))
            counts = [share(of_all, number) for of_all in totals]
            done, found = damage(trained(model, Path(root)), counts, chance)
            total += done
            wrong += [f"{model}: {problem}" for problem in found]
    for kind in dict.fromkeys(kind for kind, _ in total):
        counts = [total[kind, name] for name in FILES]
        by_file = ", ".join(map("{} in {}".format, counts, FILES))
        print(f"{sum(counts):5} x {kind:<12} ({by_file})")
    for problem in wrong[:20]:
        print(f"UNDETECTED {problem}")
    damages = f"{total.total()} damages to real checkpoints of {len(MODELS)} models"
    print(f"{len(wrong)} undetected of {damages}")
    return int(bool(wrong))
