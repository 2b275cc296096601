import json
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.data.dataset import Loader
from framework.errors import DataError
from framework.experiment.experiment import train
from framework_plugins.datasets.array_files import DEBIAN_FOLDER, idx_file, read_idx
from framework_plugins.datasets.readers.fetched import cache_folder

RNG = np.random.default_rng(0)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def draw(folder, count, size=(12, 8), ending="png"):
    """Write random images, of width 12 and height 8 by default."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{ending}")


@pytest.fixture
def pets(tmp_path):
    draw(tmp_path / "pets/cat", 20)
    draw(tmp_path / "pets/dog", 10, ending="jpg")
    (tmp_path / "pets/dog/notes.txt").write_text("not an image")
    (tmp_path / "pets/.cache").mkdir()
    return tmp_path / "pets"


def test_folders_are_classes(pets):
    data = fw.datasets.build("image_folder", path=pets, size=8, test_fraction=0.1, val_fraction=0.2)
    assert (data.in_shape, data.out_shape, data.classes) == ((3, 8, 8), (2,), ["cat", "dog"])
    assert [len(split) for split in (data.train, data.val, data.test)] == [21, 6, 3]
    assert data.val.labels.bincount().tolist() == [4, 2]
    inputs = torch.stack([x for x, _ in data.train])
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0
    )


def test_an_input_is_the_central_square_of_an_image(pets):
    data = fw.datasets.build(
        "image_folder", path=pets, size=8, normalize=False, val_fraction=0.0, test_fraction=0.0
    )
    pixels = np.array(Image.open(pets / "cat/03.png"))[:, 2:10]
    x, y = data.train[3]
    np.testing.assert_allclose(x * 255, pixels.transpose(2, 0, 1), atol=1e-4)
    assert (x.dtype, y.item()) == (torch.float32, 0)
    gray = fw.datasets.build("image_folder", path=pets, size=4, color="gray")
    assert gray.train[0][0].shape == (1, 4, 4)


def test_parts_with_folders_are_kept(tmp_path):
    for part, count in (("train", 10), ("valid", 3), ("test", 4)):
        draw(tmp_path / part / "cat", count)
    draw(tmp_path / "train/dog", 10)
    data = fw.datasets.build("image_folder", path=tmp_path, size=4)
    assert [len(split) for split in (data.train, data.val, data.test)] == [20, 3, 4]
    draw(tmp_path / "test/dgo", 1)
    with pytest.raises(DataError, match=r"test/dgo: no such class in train; did you mean 'dog'\?"):
        fw.datasets.build("image_folder", path=tmp_path, size=4)


def test_workers_decode_the_same(pets):
    data = fw.datasets.build("image_folder", path=pets, size=8)
    expected = Loader(data.train, batch_size=8, shuffle=True).epoch()
    found = Loader(data.train, batch_size=8, shuffle=True, workers=2).epoch()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_images_to_predict(pets):
    data = fw.datasets.build("image_folder", path=pets, size=8, val_fraction=0.0, test_fraction=0.0)
    facts = json.loads(json.dumps(data.facts()))
    read = type(data).read_inputs
    cats = torch.stack([data.train[row][0] for row in range(20)])
    assert torch.equal(read(pets / "cat", facts), cats)
    assert torch.equal(read(pets / "cat/07.png", facts)[0], data.train[7][0])
    np.save(pets / "pixels.npy", np.zeros((2, 3, 8, 8), np.uint8))
    assert read(pets / "pixels.npy", facts).shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="no such file or folder"):
        read(pets / "none", facts)
    with pytest.raises(DataError, match=r"notes.txt cannot be read as an image"):
        read(pets / "dog/notes.txt", facts)


def test_an_image_of_another_format_runs_no_program(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *settings: run.append(settings))
    draw(tmp_path / "a", 2)
    draw(tmp_path / "b", 2)
    (tmp_path / "b/00.png").write_bytes(EPS)
    with pytest.raises(DataError, match=r"b/00.png cannot be read as an image"):
        fw.datasets.build("image_folder", path=tmp_path, size=8)
    assert run == []


def test_rotated_and_transparent_images(tmp_path):
    draw(tmp_path / "a", 1)
    draw(tmp_path / "b", 1)
    turned = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned.save(tmp_path / "a/00.png", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "b/00.png")
    data = fw.datasets.build(
        "image_folder", path=tmp_path, size=8, normalize=False, val_fraction=0, test_fraction=0
    )
    np.testing.assert_allclose(
        data.train[0][0][0] * 255, np.arange(64).reshape(8, 8)[::-1, ::-1], atol=1e-4
    )
    assert data.train[1][0][:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("keep", [0.02, 0.5])
def test_the_error_of_a_corrupt_image_names_it(tmp_path, workers, keep):
    for name in "ab":
        draw(tmp_path / name, 2, (64, 64), "jpg")
    data = fw.datasets.build("image_folder", path=tmp_path, size=8, val_fraction=0, test_fraction=0)
    file = tmp_path / "b/01.jpg"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(DataError, match=r"^\S*b/01.jpg cannot be read as an image"):
        list(Loader(data.train, workers=workers).epoch())
    file.unlink()
    with pytest.raises(DataError, match="the image no longer exists"):
        list(Loader(data.train, workers=workers).epoch())


def test_folders_that_are_not_data_sets_are_refused(tmp_path):
    def refused(said):
        with pytest.raises(DataError, match=said):
            fw.datasets.build("image_folder", path=tmp_path / "pets")

    refused("no such folder")
    (tmp_path / "pets").mkdir()
    refused("has no folders; put the images of each class")
    draw(tmp_path / "pets/cat", 2)
    refused("only one class, 'cat'")
    (tmp_path / "pets/dog").mkdir()
    refused("pets/dog has no images")
    (tmp_path / "pets/dog/a.png").touch()
    refused("a.png is an empty file")


def test_without_pillow_the_error_says_what_to_install(pets, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"pip install 'framework\[images\]'"):
        fw.datasets.build("image_folder", path=pets)


# Fashion-MNIST: the experiment on a part of the data, if it is fetched


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Write the first 2,000 images for training and the first 500 of the test as IDX files."""
    source = DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else cache_folder() / "fashion-mnist"
    if not source.is_dir():
        pytest.skip("Fashion-MNIST is not fetched: scripts/fetch_data fashion_mnist")
    folder = tmp_path_factory.mktemp("clothes")
    for part, count in (("train", 2000), ("t10k", 500)):
        pixels = read_idx(idx_file(source, f"{part}-images"))[:count]
        labels = read_idx(idx_file(source, f"{part}-labels"))[:count]
        images_header = struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape)
        labels_header = struct.pack(">4BI", 0, 0, 8, 1, count)
        images_file = folder / f"{part}-images-idx3-ubyte"
        labels_file = folder / f"{part}-labels-idx1-ubyte"
        images_file.write_bytes(images_header + pixels.tobytes())
        labels_file.write_bytes(labels_header + labels.tobytes())
    return folder


def test_clothes_are_classified(clothes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "model.channels=[8,16]",
        "model.width=32",
        "loader.batch_size=32",
        "trainer.max_epochs=2",
    ]
    results = []
    line = CommandLine(
        ["experiment=fashion_mnist_cnn", f"data.path={clothes}", *small, "callbacks=[checkpoint]"]
    )
    compose(line, lambda job: results.append(train(job.spec, job.experiment, job.overrides)))
    assert results[0].metrics["test/accuracy"] > 0.6  # always the same class: 0.1
