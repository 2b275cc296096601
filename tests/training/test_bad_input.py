"""Bad input files on the command line: the error of each sort of data, and the exceptions.

The messages of a reader of files are tested in full with that reader.
"""

import shlex
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import framework as fw
from framework.cli.main import main
from framework.runs.checkpoint import listed

QUICK = "trainer.max_epochs=1 'callbacks=[checkpoint]' loggers=json_lines"
COMMANDS = {
    "images": "data=image_folder data.path=pets data.size=8 model=cnn model.channels=[2]"
    " model.width=4",
    "sounds": "data=audio_folder data.path=sounds data.sample_rate=8000 data.seconds=0.1"
    " model=sequence_cnn",
    "table": "data=table data.path=t.csv data.target=kind model.width=4",
    "amounts": "data=table data.path=t.csv data.target=amount task=regression metrics=mae"
    " model.width=4",
    "series": "data=series data.path=s.csv data.target=load data.lookback=8 data.horizon=4"
    " model=linear_forecast task=regression metrics=mae",
    "sequences": "data=ts_files data.path=c.ts model=sequence_cnn model.channels=[4]",
    "texts": "data=text_folder data.path=texts model=embedding_bag",
    "arrays": "data=npz data.path=a.npz model.width=4",
}


def pictures(folder, count=12):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number:02}.png")


def sound(file, samples=900, rate=8000, channels=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        noise = np.random.default_rng(0).integers(-999, 999, samples * channels)
        opened.writeframes(noise.astype("<i2").tobytes())


def good(folder):
    """Write a small valid data set of each sort."""
    for kind in ("cat", "dog"):
        pictures(folder / "pets" / kind)
        for number in range(10):
            sound(folder / "sounds" / kind / f"{number}.wav")
            (folder / "texts" / kind).mkdir(parents=True, exist_ok=True)
            (folder / "texts" / kind / f"{number}.txt").write_text(f"the {kind} number {number}")
    rows = [
        f"{row},{('red', 'blue')[row % 2]},{row / 2 + 0.25},{('cat', 'dog')[row % 2]}"
        for row in range(40)
    ]
    (folder / "t.csv").write_text("\n".join(["size,colour,amount,kind", *rows]))
    (folder / "s.csv").write_text(
        "\n".join(["load,wind", *(f"{100 + row % 7},{row}" for row in range(60))])
    )
    cases = [f"{row},1,2:{row},3,4:{'ab'[row % 2]}" for row in range(30)]
    (folder / "c.ts").write_text("\n".join(["@classLabel true a b", "@data", *cases]))
    np.savez(folder / "a.npz", x=np.random.default_rng(0).random((40, 3)), y=np.arange(40) % 2)


def row(file, number, text):
    """Replace a row; the first one below the header is 1."""
    lines = Path(file).read_text().splitlines()
    lines[number] = text
    Path(file).write_text("\n".join(lines))


def cut(file, octets):
    Path(file).write_bytes(Path(file).read_bytes()[:octets])


def keep_one_picture_of_each_class():
    for file in Path("pets").glob("*/*.png"):
        if file.name != "00.png":
            file.unlink()


def arrays(**changed):
    np.savez("a.npz", **dict(np.load("a.npz")) | changed)


@pytest.fixture
def refused(command, tmp_path):
    """Run a command; check for an error in one or two lines, status 2, and unchanged files."""

    def run(line):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        status, _, err = command(line)
        assert status == 2, err
        lines = err.splitlines()
        assert len(lines) in (1, 2), err
        assert lines[0].startswith("framework: ")
        assert "Traceback" not in err
        assert "cannot be built" not in err, "that would be an error of the part"
        assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        return err

    return run


@pytest.mark.parametrize(
    ("sort", "spoil", "said"),
    [
        # pictures: the training split is read before training, for the mean and deviation
        (
            "images",
            lambda: cut("pets/cat/00.png", 60),
            "pets/cat/00.png cannot be read as an image",
        ),
        (
            "images",
            lambda: Path("pets/cat/00.png").write_text("hello"),
            "pets/cat/00.png cannot be read as an image",
        ),
        (
            "images",
            lambda: Path("pets/dog/01.png").write_bytes(b""),
            "pets/dog/01.png is an empty file; delete it or",
        ),
        (
            "images",
            lambda: Path("pets/dog/x.png").symlink_to("gone"),
            "pets/dog/x.png is a broken link",
        ),
        (
            "images",
            lambda: Path("pets/eel").mkdir(),
            "pets/eel has no images; known suffixes: .bmp, ",
        ),
        (
            "images",
            lambda: shutil.rmtree("pets/dog"),
            "pets has only one class, 'cat'; expected at least two classes",
        ),
        (
            "images",
            lambda: [shutil.rmtree(f"pets/{kind}") for kind in ("cat", "dog")],
            "pets has no folders; put the",
        ),
        ("images", lambda: shutil.rmtree("pets"), "pets: no such folder (looked in "),
        (
            "images",
            lambda: [shutil.rmtree("pets"), Path("pets").write_text("")],
            "data.path=pets is a file; expected a folder",
        ),
        (
            "images",
            keep_one_picture_of_each_class,
            "2 rows are too few for a validation and a test split; add rows, or set ",
        ),
        # sounds
        (
            "sounds",
            lambda: sound(Path("sounds/cat/3.wav"), rate=16_000),
            "sounds/cat/3.wav has 16000 samples per second, expected 8000: set ",
        ),
        (
            "sounds",
            lambda: sound(Path("sounds/cat/3.wav"), samples=0),
            "sounds/cat/3.wav is 0 s long, shorter than data.min_seconds=0.01",
        ),
        (
            "sounds",
            lambda: cut("sounds/cat/3.wav", 500),
            "sounds/cat/3.wav is cut off: it has 228 of 900 frames; replace it",
        ),
        (
            "sounds",
            lambda: Path("sounds/eel").mkdir(),
            "sounds/eel has no sounds; known suffixes: .aif, ",
        ),
        # tables; row 1 is the first below the header
        (
            "table",
            lambda: row("t.csv", 7, "large,red,1,cat"),
            "t.csv, row 7, column 'size': 'large' is not a number; correct it, or ",
        ),
        (
            "table",
            lambda: row("t.csv", 7, "1e39,red,1,cat"),
            "t.csv, row 7, column 'size': '1e39' is not a number",
        ),
        (
            "table",
            lambda: row("t.csv", 7, "7,red,1,"),
            "t.csv, row 7: the target 'kind' is empty; fill it in or drop",
        ),
        ("table", lambda: row("t.csv", 7, "7,red,cat"), "t.csv, line 8: 3 cells, but 4 columns"),
        (
            "table",
            lambda: row("t.csv", 0, "size,colour,amount,kinds"),
            "t.csv has no column 'kind'; did you mean",
        ),
        (
            "table",
            lambda: row("t.csv", 0, ",colour,amount,kind"),
            "t.csv: column 1 has no name (row numbers?); name",
        ),
        ("table", lambda: Path("t.csv").write_text("size,kind\n"), "t.csv has no rows"),
        (
            "table",
            lambda: [Path("t.csv").unlink(), Path("t.csv").mkdir()],
            "t.csv is a folder; expected a .csv or",
        ),
        (
            "amounts",
            lambda: row("t.csv", 7, "7,red,NaN,cat"),
            "t.csv, row 7: the target 'amount' is empty; fill it in or drop the row",
        ),
        (
            "amounts",
            lambda: row("t.csv", 7, "7,red,many,cat"),
            "t.csv, row 7, column 'amount': 'many' is not a number",
        ),
        # series, and sequences of unequal length
        (
            "series",
            lambda: row("s.csv", 30, ",1"),
            "s.csv, row 30: 'load' is empty; a series needs a number in every",
        ),
        (
            "series",
            lambda: row("s.csv", 30, "low,1"),
            "s.csv, row 30, column 'load': 'low' is not a number; correct it",
        ),
        (
            "series",
            lambda: Path("s.csv").write_text("load\n" + "5\n" * 15),
            "s.csv: the 10 training rows of 15 are fewer than a window of 8 + 4 rows; ",
        ),
        (
            "sequences",
            lambda: row("c.ts", 4, "1,2,3:1,2:a"),
            "c.ts, line 5: expected channels of equal length, got [3, 2] frames",
        ),
        (
            "sequences",
            lambda: row("c.ts", 4, "1,2,?:1,2,3:a"),
            "c.ts, line 5: expected numbers as frames, got '?'",
        ),
        (
            "sequences",
            lambda: row("c.ts", 4, "1,2,3:1,2,3:"),
            "c.ts, line 5: the class at the end of the line is missing",
        ),
        # texts and arrays
        (
            "texts",
            lambda: Path("texts/cat/3.txt").write_bytes(b"caf\xe9"),
            "texts/cat/3.txt is not UTF-8 text (byte 3)",
        ),
        (
            "texts",
            lambda: Path("texts/eel").mkdir(),
            "texts/eel has no .txt file; add some",
        ),
        (
            "arrays",
            lambda: arrays(x=np.full((40, 3), np.nan)),
            "a.npz: the train inputs: row 1 contains NaN or infinity",
        ),
        ("arrays", lambda: arrays(y=np.arange(39) % 2), "a.npz: 40 train inputs, but 39 targets"),
        ("arrays", lambda: cut("a.npz", 300), "a.npz cannot be read as an array"),
    ],
)
def test_training_with_bad_data_is_an_error(sort, spoil, said, refused, tmp_path):
    good(tmp_path)
    spoil()
    assert said in refused(f"train {COMMANDS[sort]} {QUICK}")


def test_a_sequence_longer_than_the_model_takes_is_an_error(refused, tmp_path):
    good(tmp_path)
    assert "c.ts, sequence 1: 3 frames; the model takes 2 (data.length)" in refused(
        f"train {COMMANDS['sequences']} data.length=2 {QUICK}"
    )


def test_an_error_in_a_test_file_names_that_file(refused, tmp_path):
    good(tmp_path)
    (tmp_path / "test.csv").write_text("size,colour,amount,kind\n1,red,1,cat\ntwo,red,1,dog\n")
    (tmp_path / "test.ts").write_text("@classLabel true a b\n@data\n1,2,3:4,5,6:a\n1,2,3:a\n")
    said = refused(f"train {COMMANDS['table']} data.test_path=test.csv {QUICK}")
    assert "test.csv, row 2, column 'size': 'two' is not a number" in said
    said = refused(f"train {COMMANDS['sequences']} data.test_path=test.ts {QUICK}")
    assert "test.ts, line 4: 1 channels, but 2 in the first sequence" in said
    (tmp_path / "test.ts").write_text("@classLabel true a b\n@data\n1,2,3:a\n")
    said = refused(f"train {COMMANDS['sequences']} data.test_path=test.ts {QUICK}")
    assert "test.ts, sequence 1: 1 channels; the model takes 2" in said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train a model on each sort of data."""
    root = tmp_path_factory.mktemp("runs")
    good(root)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        for sort in ("images", "sounds", "table", "series", "sequences"):
            with pytest.raises(SystemExit) as ended:
                main(shlex.split(f"train {COMMANDS[sort]} run.name={sort} {QUICK}"))
            assert ended.value.code == 0
    return root / "runs" / "default"


@pytest.mark.parametrize(
    ("sort", "file", "said"),
    [
        ("images", "notes.png", "notes.png cannot be read as an image"),
        ("images", "hollow", "hollow: expected files with a suffix of .bmp"),
        ("images", "nan.npy", "nan.npy: row 1 contains NaN or infinity"),
        (
            "images",
            "wide.npy",
            "wide.npy: rows have shape (3, 8, 9); the model takes (3, 8, 8)",
        ),
        ("sounds", "quick.wav", "quick.wav has 16000 samples per second, expected 8000"),
        ("table", "text.csv", "text.csv, row 2, column 'size': 'two' is not a number; correct it"),
        ("table", "color.csv", "color.csv has no column 'colour'; did you mean 'color'?"),
        ("table", "header.csv", "header.csv has no rows"),
        ("series", "few.csv", "few.csv has 5 rows; the model needs the last 8"),
        (
            "series",
            "gap.csv",
            "gap.csv, row 9: 'load' is empty; a series needs a number in every row",
        ),
        ("sequences", "long.ts", "long.ts, sequence 2: 5 frames; the model takes 3 (data.length)"),
    ],
)
def test_prediction_for_bad_input_is_an_error(sort, file, said, refused, runs, tmp_path):
    contents = {
        "notes.png": "no picture",
        "text.csv": "size,colour,amount\n1,red,1\ntwo,red,1\n",
        "color.csv": "size,color,amount\n1,red,1\n",
        "header.csv": "size,colour,amount\n",
        "few.csv": "load\n" + "5\n" * 5,
        "gap.csv": "load\n" + "5\n" * 8 + "NA\n5\n",
        "long.ts": "@classLabel false\n@data\n1,2:3,4\n1,2,3,4,5:1,2,3,4,5\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "hollow").mkdir()
    np.save(tmp_path / "nan.npy", np.full((1, 3, 8, 8), np.nan))
    np.save(tmp_path / "wide.npy", np.zeros((1, 3, 8, 9)))
    sound(tmp_path / "quick.wav", rate=16_000)
    assert said in refused(f"predict {runs / sort} --input {file} --output y.csv")


# input that is accepted, and runs that continue


def test_all_categories_that_were_not_in_training_are_the_same(command, runs, tmp_path):
    """All inputs of their one-hot encoding are 0."""
    (tmp_path / "new.csv").write_text("size,colour,amount\n3,pink,1\n3,green,1\n3,red,1\n")
    status, _, err = command(f"predict {runs / 'table'} --input new.csv --output y.csv")
    assert status in (0, None), err
    lines = (tmp_path / "y.csv").read_text().splitlines()[1:]
    pink, green, red = (line.partition(",")[2] for line in lines)  # without the row
    assert pink == green != red


def test_sounds_of_another_rate_length_or_channels_can_be_converted(command, tmp_path):
    good(tmp_path)
    sound(tmp_path / "sounds/cat/3.wav", samples=5000, rate=16_000)
    sound(tmp_path / "sounds/dog/3.wav", channels=2)
    status, _, err = command(f"train {COMMANDS['sounds']} data.resample=true {QUICK}")
    assert status in (0, None), err
    data = fw.datasets.build(
        "audio_folder",
        path=tmp_path / "sounds",
        sample_rate=8000,
        seconds=0.1,
        resample=True,
        test_fraction=0.0,
    )
    real = torch.cat([data.train.tensors[0], data.val.tensors[0]])[:, 1].sum(1)
    assert real.tolist() == [800] * 20, "the middle of a longer sound"


def test_a_grey_picture_of_16_bits_is_not_all_white(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(ramp).save(tmp_path / kind / "0.png")
    for color in ("gray", "rgb"):
        data = fw.datasets.build(
            "image_folder",
            path=tmp_path,
            size=8,
            color=color,
            normalize=False,
            val_fraction=0,
            test_fraction=0,
        )
        for channel in data.train[0][0]:
            torch.testing.assert_close(
                channel, torch.from_numpy(ramp / 65535).float(), atol=1 / 255, rtol=0
            )


class TestBadPictureDuringTraining:
    """A bad picture that is not read before training."""

    line = f"train {COMMANDS['images']} data.normalize=false data.val_fraction=0"
    line += " data.test_fraction=0 loader.batch_size=4 trainer.max_epochs=2 loggers=json_lines"
    line += " 'callbacks=[checkpoint]' callbacks.checkpoint.every=1steps"

    def weights(self, run):
        return (listed(Path(run) / "checkpoints")[-1] / "model.safetensors").read_bytes()

    def test_the_run_resumes_exactly_after_the_picture_is_repaired(self, command, tmp_path):
        good(tmp_path)
        status, _, err = command(f"{self.line} run.name=whole")
        assert status in (0, None), err
        picture = tmp_path / "pets/dog/07.png"
        content = picture.read_bytes()
        picture.write_bytes(content[:60])
        status, _, err = command(f"{self.line} run.name=cut")
        assert status == 2
        assert err.startswith("framework: pets/dog/07.png cannot be read as an image")
        assert len(err.splitlines()) == 1
        assert len(listed(tmp_path / "runs/default/cut/checkpoints")) > 0, "what was learnt is kept"
        picture.write_bytes(content)
        status, out, err = command(f"{self.line} run.name=cut resume=auto")
        assert status in (0, None), err
        assert "resuming" in out
        assert self.weights("runs/default/cut") == self.weights("runs/default/whole")

    def test_the_picture_is_left_out_with_on_bad_sample_skip(self, command, tmp_path):
        good(tmp_path)
        cut(tmp_path / "pets/dog/07.png", 60)
        with pytest.warns(UserWarning, match=r"pets/dog/07.png cannot be read .* is skipped"):
            status, _, err = command(f"{self.line} loader.on_bad_sample=skip")
        assert status in (0, None), err
