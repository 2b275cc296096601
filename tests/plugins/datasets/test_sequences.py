"""Sequences of unequal length: padding, errors of malformed files, models, and real data."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import framework as fw
from framework.errors import DataError
from runs import require_data, run_training

TS = """# a comment
@problemName Small
@classLabel true a b
@data
1,2,3:10,20,30:a
4:40:b
5,6:50,60:a
7,8:70,80:b
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.ts").write_text(TS)
    return tmp_path / "small.ts"


def load_all(path, **settings):
    return fw.datasets.build("ts_files", path=path, val_fraction=0.0, test_fraction=0.0, **settings)


def test_sequences_are_padded_and_have_a_mask(small):
    inputs, targets = load_all(small, normalize=False).train.tensors
    assert inputs[0].tolist() == [[1, 2, 3], [10, 20, 30], [1, 1, 1]]
    assert inputs[1].tolist() == [[4, 0, 0], [40, 0, 0], [1, 0, 0]]
    assert targets.tolist() == [0, 1, 0, 1]


def test_channels_are_standardised_without_padding(small):
    data = load_all(small)
    inputs = data.train.tensors[0]
    real = inputs[:, 0][inputs[:, -1] == 1]
    frames = np.arange(1, 9)
    np.testing.assert_allclose(real, (frames - frames.mean()) / frames.std(), rtol=1e-5)
    assert (inputs[:, :-1] * (1 - inputs[:, -1:])).abs().max() == 0
    assert torch.equal(type(data).read_inputs(small, data.facts()), inputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TS.replace("40", "forty"),
            r"bad\.ts, line 6: expected numbers .* got 'forty'",
        ),
        (TS.replace("40", "?"), r"line 6: .*'\?'"),
        (TS.replace("40", "nan"), "line 6: expected numbers .* got 'nan'"),
        (TS.replace("4:40:b", "4:40,41:b"), r"line 6: .*, got \[1, 2\] frames"),
        (TS.replace("4:40:b", "4:b"), "line 6: 1 channels, but 2 in the first sequence"),
        (TS.replace("@data", ""), "it has no line @data"),
        (TS.partition("1,2,3")[0], "has no sequences"),
    ],
)
def test_the_error_of_a_malformed_line_names_it(tmp_path, text, message):
    (tmp_path / "bad.ts").write_text(text)
    with pytest.raises(DataError, match=message):
        load_all(tmp_path / "bad.ts")


def test_a_sequence_longer_than_the_model_is_refused(small):
    with pytest.raises(DataError, match=r"small\.ts, sequence 1: 3 frames; the model takes 2"):
        load_all(small, length=2)


def test_the_output_of_a_model_does_not_depend_on_padding():
    require_data("vowels")
    model = fw.models.build(
        "sequence_cnn", (13, 29), (9,), channels=[8, 8], stride=1, pool="attention"
    ).eval()
    x = fw.datasets.build("vowels").test[:4][0]
    longest = int(x[:, -1].sum(1).max())
    torch.testing.assert_close(
        model(x[:, :, :longest]), model(F.pad(x, (0, 5))), atol=1e-5, rtol=1e-5
    )


def test_speakers_are_recognised():
    require_data("vowels")
    result = run_training(
        "experiment=vowels",
        "trainer.max_epochs=5",
        "model.channels=[32]",
        "optimizer.lr=0.01",
        "callbacks=[checkpoint]",
    )
    assert result.metrics["test/accuracy"] > 0.8  # of the most frequent speaker: 0.24


def test_the_error_of_missing_data_has_the_command_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = r"vowels is not in .* with: .*scripts/fetch_data'? vowels \(data="
    with pytest.raises(DataError, match=facts):
        fw.datasets.build("vowels")
