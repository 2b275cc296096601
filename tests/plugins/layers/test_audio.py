"""Audio: features against librosa, SpecAugment against its definition, files, and models."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from scipy import signal

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.data.dataset import Loader
from framework.errors import BuildError, DataError
from framework.experiment.experiment import Experiment, train
from framework.experiment.trained.load import open_run
from framework.runs.checkpoint import listed
from framework.runtime.shapes import output_shape
from framework_plugins.datasets.audio import (
    DEBIAN_FOLDER,
    PITCH,
    VOICES,
    find_prompts,
    find_voices,
    read_waveform,
    resampled,
)
from framework_plugins.datasets.readers.fetched import cache_folder
from voices import RATE, small_voices, tone, write_wav

# Computed with librosa 0.11.0: `filters.mel` and `feature.melspectrogram` (n_fft 256, window 200,
# hop 80, 24 mels, power 2, zero padding) with its Slaney and HTK scales (HTK: norm=None), and
# `feature.mfcc` of ln max(1e-6, mel).
LIBROSA = dict(np.load(Path(__file__).parents[2] / "golden" / "mel_librosa.npz"))


def block(name, in_shape=(2, 4000), **settings):
    return fw.blocks.build(name, in_shape, **settings)


def with_mask(waveform, samples=None):
    x = torch.zeros(1, 2, samples or len(waveform))
    x[0, 0, : len(waveform)] = torch.as_tensor(waveform)
    x[0, 1, : len(waveform)] = 1
    return x


# features


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_log_mel_is_that_of_librosa(scale):
    mel = block("log_mel", sample_rate=RATE, mels=24, scale=scale)
    np.testing.assert_allclose(mel.filters, LIBROSA[f"filters_{scale}"], atol=1e-6)
    expected = np.log(np.maximum(LIBROSA[f"mel_{scale}"], 1e-6))
    features = mel(with_mask(LIBROSA["wave"]))[0]
    assert features.shape == (25, 25)
    # librosa has one frame more, which is centred after the last sample.
    np.testing.assert_allclose(features[:-1], expected[:, :25], atol=2e-3)


def test_mfcc_are_those_of_librosa():
    features = block("mfcc", sample_rate=RATE, mels=24)(with_mask(LIBROSA["wave"]))[0]
    np.testing.assert_allclose(features[:-1], LIBROSA["mfcc"][:, :25], atol=4e-3)


def test_a_frame_is_the_fourier_sum_of_its_window():
    """Compute frame 7 of a short waveform from the definition, without an FFT."""
    waveform = np.random.default_rng(0).standard_normal(900).astype(np.float32)
    n_fft = 128
    length = 100
    hop = 50
    frame = 7
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(length) / length)
    centre = frame * hop
    samples = np.zeros(n_fft)
    samples[14 : 14 + length] = window * waveform[centre - length // 2 : centre + length // 2]
    frequencies = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft
    bins = np.exp(-2j * np.pi * frequencies) @ samples
    mel = block(
        "log_mel", sample_rate=1000, mels=8, window_ms=100, hop_ms=50, window="hamming", n_fft=n_fft
    )
    expected = np.log(mel.filters.double().numpy() @ np.abs(bins) ** 2)
    np.testing.assert_allclose(mel(with_mask(waveform))[0, :-1, frame], expected, rtol=1e-4)


def test_the_mask_has_the_frame_rate_and_padding_changes_nothing():
    waveform = LIBROSA["wave"]
    for name in ("log_mel", "mfcc"):
        features = block(name, sample_rate=RATE)
        short = features(with_mask(waveform))
        padded = features(with_mask(waveform, 3600))
        assert short[0, -1].tolist() == [1.0] * 25
        assert padded[0, -1].tolist() == [1.0] * 25 + [0.0] * 20
        torch.testing.assert_close(padded[:, :, :25], short)
        assert padded[0, :, 25:].eq(0).all()


def test_masked_samples_do_not_change_the_features():
    silent = with_mask(LIBROSA["wave"], 3600)
    noisy = silent.clone()
    noisy[0, 0, 2000:] = torch.randn(1600)
    mel = block("log_mel", sample_rate=RATE)
    assert torch.equal(mel(noisy), mel(silent))


def test_features_have_shapes_and_refuse_impossible_settings():
    assert output_shape(block("log_mel", (2, 16000)), (2, 16000)) == (41, 100)
    assert output_shape(block("mfcc", (2, 16001), coefficients=20), (2, 16001)) == (21, 101)
    with pytest.raises(
        BuildError, match=r"log_mel expects \(channels\+1, samples\), got \(8000,\)"
    ):
        block("log_mel", (8000,))
    with pytest.raises(BuildError, match="which is the mask only"):
        block("log_mel", (1, 8000))
    with pytest.raises(BuildError, match=r"n_fft=256.* 400 .*window"):
        block("log_mel", n_fft=256)
    with pytest.raises(BuildError, match=r"high_hz=.* sample_rate=8000"):
        block("log_mel", sample_rate=8000, high_hz=5000.0)
    with pytest.raises(BuildError, match="no frequency bin of n_fft=256; reduce mels"):
        block("log_mel", sample_rate=8000, mels=200)
    with pytest.raises(BuildError, match=r"coefficients=41.* mels=40"):
        block("mfcc", coefficients=41)


def features_of_ones(rows, lengths, channels=40, frames=100):
    x = torch.ones(rows, channels + 1, frames)
    for row, length in enumerate(lengths):
        x[row, :, length:] = 0
    return x


def test_spec_augment_draws_bands_as_the_paper_defines_them():
    """The width f of one mask is uniform in 0..F, and its start is uniform in 0..channels - f."""
    x = features_of_ones(20_000, [], 12, 1)
    out = block(
        "spec_augment", (13, 1), frequency_masks=1, frequency_width=4, time_masks=0
    ).train()(x)
    hidden = out[:, :-1, 0] == 0
    width = hidden.sum(1)
    assert width.bincount().tolist() == pytest.approx([4000] * 5, rel=0.08)
    first = hidden.float().argmax(1)
    for wide in range(1, 5):
        places = 12 - wide + 1
        rows = width == wide
        for offset in range(wide):
            assert hidden[rows, first[rows] + offset].all(), "a band is contiguous"
        counts = first[rows].bincount(minlength=places).tolist()
        assert counts == pytest.approx([rows.sum().item() / places] * places, rel=0.25)


def test_spec_augment_hides_time_within_the_real_frames_and_its_share():
    lengths = [100, 50, 20, 4]
    x = features_of_ones(4 * 1000, lengths * 1000)
    out = block(
        "spec_augment", (41, 100), frequency_masks=0, time_masks=1, time_width=8, time_share=0.2
    ).train()(x)
    assert torch.equal(out[:, -1], x[:, -1]), "the mask does not change"
    hidden = ((out[:, 0] == 0) & (x[:, -1] == 1)).sum(1).reshape(1000, 4)
    assert hidden.amax(0).tolist() == [8, 8, 4, 0]
    assert hidden.float().mean(0).tolist() == pytest.approx([4, 4, 2, 0], rel=0.1)


def test_spec_augment_is_for_training_alone_and_repeats_with_the_seed():
    x = torch.randn(4, 41, 100)
    augment = block("spec_augment", (41, 100))
    assert torch.equal(augment.eval()(x), x)
    torch.manual_seed(5)
    first = augment.train()(x)
    assert not torch.equal(augment(x), first)
    torch.manual_seed(5)
    assert torch.equal(augment(x), first)


# files


@pytest.fixture
def sounds(tmp_path):
    for name, hertz in (("high", 1500), ("low", 300)):
        for number in range(10):
            write_wav(
                tmp_path / "sounds" / name / f"{number:02}.wav",
                tone(hertz + 20 * number, 0.1 + 0.05 * number),
            )
    return tmp_path / "sounds"


def folder(path, **settings):
    return fw.datasets.build(
        "audio_folder", path=path, **{"sample_rate": RATE, "seconds": 0.4} | settings
    )


@pytest.mark.parametrize(("width", "tolerance"), [(1, 5e-3), (2, 2e-5), (3, 1e-6), (4, 1e-6)])
def test_wav_of_every_width(tmp_path, width, tolerance):
    write_wav(tmp_path / "a.wav", tone(440), width=width)
    samples, rate = read_waveform(tmp_path / "a.wav")
    assert (rate, samples.dtype) == (RATE, torch.float32)
    np.testing.assert_allclose(samples, tone(440), atol=2 * tolerance)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(440), np.zeros(2400)], axis=1).reshape(-1)
    write_wav(tmp_path / "a.wav", stereo, channels=2)
    np.testing.assert_allclose(read_waveform(tmp_path / "a.wav")[0], tone(440) / 2, atol=1e-4)


@pytest.mark.parametrize("ending", ["flac", "ogg", "wav"])
def test_soundfile_reads_what_the_standard_library_does_not(tmp_path, ending):
    soundfile = pytest.importorskip("soundfile")
    subtype = {"wav": "FLOAT"}.get(ending)
    soundfile.write(tmp_path / f"a.{ending}", tone(440), RATE, subtype=subtype)
    samples, rate = read_waveform(tmp_path / f"a.{ending}")
    assert rate == RATE
    np.testing.assert_allclose(samples, tone(440), atol=0.05 if ending == "ogg" else 1e-4)


def test_without_soundfile_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(
        DataError, match=r"a.flac needs soundfile.*pip install 'framework\[audio\]'"
    ):
        read_waveform(tmp_path / "a.flac")


def test_a_sound_is_its_middle_or_has_zeros_after_it(sounds):
    for in_memory in (True, False):
        data = folder(sounds, seconds=0.2, in_memory=in_memory, val_fraction=0.0, test_fraction=0.0)
        assert (data.in_shape, data.classes, len(data.train)) == ((2, 1600), ["high", "low"], 20)
        short, label = data.train[0]
        assert (short[1].sum(), int(label)) == (800, 0)
        np.testing.assert_allclose(short[0, :800], tone(1500, 0.1), atol=1e-4)
        assert short[:, 800:].eq(0).all()
        long = data.train[9][0]
        np.testing.assert_allclose(long[0], tone(1500 + 180, 0.55)[1400:3000], atol=1e-4)


def test_batches_from_memory_from_files_and_from_workers_are_the_same(sounds):
    def batches(split, workers):
        return list(Loader(split, batch_size=5, shuffle=True, workers=workers).epoch())

    in_memory = folder(sounds)
    lazy = folder(sounds, in_memory=False)
    assert isinstance(in_memory.train, fw.TensorSplit)
    expected = batches(in_memory.train, 0)
    for workers in (0, 2):
        for one, two in zip(expected, batches(lazy.train, workers), strict=True):
            for a, b in zip(one, two, strict=True):
                assert torch.equal(a, b)


def test_another_rate_is_an_error_that_names_the_file_or_is_resampled(sounds):
    write_wav(sounds / "low" / "05.wav", tone(400, rate=11025), rate=11025)
    with pytest.raises(
        DataError,
        match=r"low/05.wav has 11025 samples per second, expected 8000.*data.resample=true",
    ):
        folder(sounds)
    data = folder(sounds, resample=True, val_fraction=0.0, test_fraction=0.0)
    sound = data.train[15][0]
    assert sound[1].sum() == 2401  # ceil(3308 · 8000 / 11025)
    np.testing.assert_allclose(sound[0, 100:2300], tone(400)[100:2300], atol=2e-3)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 16000), (16000, 8000), (44100, 16000), (11025, 16000), (7, 3)]
)
@pytest.mark.parametrize("samples", [1, 5, 997])
def test_resampling_is_that_of_scipy(rate, wanted, samples):
    waveform = np.random.default_rng(0).standard_normal(samples)
    common = math.gcd(rate, wanted)
    expected = signal.resample_poly(waveform, wanted // common, rate // common)
    np.testing.assert_allclose(resampled(torch.tensor(waveform), rate, wanted), expected, atol=1e-5)


def test_bad_files_are_named(sounds):
    file = sounds / "low" / "03.wav"
    intact = file.read_bytes()

    def refused(message):
        with pytest.raises(DataError, match=message):
            folder(sounds)
        lazy = folder(sounds, in_memory=False, val_fraction=0, test_fraction=0)
        with pytest.raises(DataError, match=message):
            list(Loader(lazy.train).epoch())

    write_wav(file, [])
    refused(r"low/03.wav is 0 s long.*min_seconds=0.01")
    write_wav(file, np.zeros(40))
    refused("low/03.wav is 0.005 s long")
    file.write_bytes(intact[:244])
    refused("low/03.wav is cut off: it has 100 of 2000 frames")
    file.write_bytes(b"no sound at all")
    refused(r"low/03.wav (cannot be read as sound|needs soundfile)")
    file.write_bytes(b"")
    refused(r"low/03.wav (cannot be read as sound|needs soundfile)")


def test_folders_without_classes_of_sounds_are_refused(sounds):
    with pytest.raises(DataError, match="no such folder"):
        folder(sounds / "nowhere")
    with pytest.raises(DataError, match="has no folders; put the sounds of each class"):
        folder(sounds / "low")
    (sounds / "none").mkdir()
    with pytest.raises(DataError, match=r"sounds/none has no sounds; known suffixes: .*\.flac"):
        folder(sounds)
    (sounds / "none").rmdir()
    for file in (sounds / "high").iterdir():
        file.rename(sounds / f"{file.name}.away")
    (sounds / "high").rmdir()
    with pytest.raises(DataError, match="only one class, 'low'"):
        folder(sounds)


def test_a_wrong_file_is_two_lines_and_status_2(command, sounds):
    write_wav(sounds / "low" / "05.wav", tone(400), rate=22050)
    status, out, err = command(f"train data=audio_folder data.path={sounds}")
    assert status == 2
    assert "high/00.wav has 8000 samples per second, expected 16000" in out + err
    assert "Traceback" not in out + err


# data sets


def test_a_prompt_is_in_one_split_with_all_its_languages(tmp_path):
    small_voices(tmp_path)
    data = fw.datasets.build(
        "asterisk", path=tmp_path, seconds=0.5, val_fraction=0.25, test_fraction=0.25
    )
    assert [len(split) for split in (data.train, data.val, data.test)] == [10, 5, 5]
    assert data.test.tensors[1].tolist() == [0, 1, 2, 3, 4]
    assert data.classes == ["English", "Spanish", "French", "Italian", "Russian"]


def test_missing_prompts_say_how_to_get_them(tmp_path):
    advice = r"98 MB.*scripts/fetch_data'? asterisk.*data=tones"
    with pytest.raises(DataError, match=advice):
        fw.datasets.build("asterisk", path=tmp_path)


def pitch_at(sound, share):
    """Return the strongest frequency of 512 samples, the lowest harmonic of a tone."""
    start = int(share * (len(sound) - 512))
    spectrum = np.abs(np.fft.rfft(sound[start : start + 512] * np.hanning(512)))
    return spectrum.argmax() * RATE / 512


def test_the_pitch_of_tones_follows_their_class():
    data = fw.datasets.build("tones", samples=50, noise=0.0, val_fraction=0.0, test_fraction=0.0)
    inputs, labels = data.train.tensors
    courses = {"steady": (1, 1), "rising": (2**0.5, 2), "falling": (0.5**0.5, 0.5), "bowed": (2, 1)}
    for name, (middle, last) in courses.items():
        for x in inputs[labels == data.classes.index(name)]:
            sound = x[0, x[1] > 0].numpy()
            first = pitch_at(sound, 0)
            assert pitch_at(sound, 0.5) / first == pytest.approx(middle, rel=0.3)
            assert pitch_at(sound, 1) / first == pytest.approx(last, rel=0.3)
    again = fw.datasets.build("tones", samples=50, noise=0.0, val_fraction=0.0, test_fraction=0.0)
    assert torch.equal(again.train.tensors[0], inputs)


# small experiments

FRONT = (
    "model.front=[{name: log_mel, sample_rate: 8000, hop_ms: 20, mels: 24},"
    "masked_batch_norm,spec_augment]"
)
CNN = ("data=tones", "model=sequence_cnn", "model.channels=[16,24]", FRONT)
CNN_2D = ("data=tones", "model=spectrogram_cnn", "model.channels=[8,16]", FRONT)
TRANSFORMER = ("data=tones", "model=sequence_transformer", "model.width=32", "model.depth=1", FRONT)
QUICK = (
    "scheduler=one_cycle",
    "optimizer.lr=0.01",
    "callbacks=[checkpoint]",
    "loggers=[]",
    "trainer.max_epochs=8",
)
TONES = len(PITCH)


def run(folder, *overrides, add=None):
    """Train in a folder, with an additional callback or logger `add`."""
    original = Experiment.trainer

    def trainer(*args):
        trainer = original(*args)
        if isinstance(add, fw.Callback):
            trainer.callbacks.append(add)
        elif add is not None:
            trainer.loggers.append(add)
        return trainer

    specs = []
    compose(CommandLine([*overrides, f"run.root={folder}"]), lambda job: specs.append(job.spec))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Experiment, "trainer", trainer)
        return train(specs[0], "default", [], say=lambda line: None)


class Recorder(fw.Logger):
    """Stores images and texts."""

    def __init__(self):
        self.pictures = {}
        self.texts = {}

    def images(self, tag, images, step):
        self.pictures.setdefault(tag, []).append(images)

    def text(self, tag, markdown, step=0):
        self.texts.setdefault(tag, []).append(markdown)


@pytest.fixture(scope="module")
def trained_cnn(tmp_path_factory):
    """Return a run of a small convolutional network on tones, and its logger."""
    recorder = Recorder()
    callbacks = ("callbacks=[checkpoint,spectrograms]", "callbacks.spectrograms.samples=6")
    return run(tmp_path_factory.mktemp("runs"), *CNN, *QUICK, *callbacks, add=recorder), recorder


def test_a_cnn_learns_tones(trained_cnn):
    """Loudness, length and first pitch have the same distribution for all classes."""
    result, _ = trained_cnn
    assert result.metrics["test/accuracy"] > 4 / TONES


def test_2d_convolutions_learn_tones(tmp_path):
    assert run(tmp_path, *CNN_2D, *QUICK).metrics["test/accuracy"] > 3.5 / TONES


def test_a_transformer_learns_tones(tmp_path):
    result = run(tmp_path, *TRANSFORMER, *QUICK, "trainer.max_epochs=6")
    assert result.metrics["test/accuracy"] > 3.5 / TONES


@pytest.mark.parametrize("model", [CNN[1:], CNN_2D[1:]], ids=["1d", "2d"])
def test_languages_are_learnt_on_a_slice(tmp_path, model):
    """Train on 80 prompts in five languages, each a fifth of them."""
    try:
        root = find_voices([DEBIAN_FOLDER, cache_folder() / "asterisk"])
    except DataError:
        pytest.skip("not fetched")
    files_by_language = [find_prompts(root / folder) for folder in VOICES.values()]
    names = sorted(set.intersection(*map(set, files_by_language)))[-80:]
    for folder, files in zip(VOICES.values(), files_by_language, strict=True):
        for name in names:
            link = tmp_path / "voices" / folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[name])
    data = ("data=asterisk", f"data.path={tmp_path / 'voices'}", "data.seconds=1")
    result = run(tmp_path, *data, *model, *QUICK)
    assert result.metrics["test/accuracy"] > 0.45


class Stop(fw.Callback):
    """Ends the process of training at a step, as a kill would."""

    def on_step_end(self, trainer):
        if trainer.state.step == 9:
            raise KeyboardInterrupt


def weights(run):
    return (listed(Path(run) / "checkpoints")[-1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model", [CNN, CNN_2D], ids=["1d", "2d"])
def test_a_run_stopped_in_mid_epoch_resumes_bit_for_bit(tmp_path, model):
    """SpecAugment and dropout draw in each step; the resumed run continues their random numbers."""
    short = (
        *model,
        *QUICK,
        "model.dropout=0.1",
        "trainer.max_epochs=2",
        "data.samples=60",
        "loader.batch_size=8",
    )
    often = "callbacks.checkpoint.every=2steps"
    whole = run(tmp_path, *short, often, "run.name=whole")
    assert whole.steps == 12
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *short, often, "run.name=cut", add=Stop())
    resumed = run(tmp_path, *short, often, "run.name=cut", "resume=auto")
    assert weights(resumed.folder) == weights(whole.folder)


def test_a_run_predicts_from_sound_files(trained_cnn, tmp_path):
    trained = open_run(trained_cnn[0].folder)
    fresh = fw.datasets.build("tones", samples=40, seed=7, val_fraction=0.0, test_fraction=0.0)
    for row in range(40):
        x, label = fresh.train[row]
        file = tmp_path / "sounds" / f"{row:02}_{fresh.classes[label]}.wav"
        write_wav(file, x[0, x[1] > 0].numpy())
    inputs = trained.read_inputs(tmp_path / "sounds")
    torch.testing.assert_close(inputs, fresh.train.tensors[0], atol=1e-4, rtol=0)
    predicted = trained.predict(inputs)["class"]
    names = [file.stem.split("_")[1] for file in sorted((tmp_path / "sounds").iterdir())]
    assert sum(map(str.__eq__, predicted, names)) > 25
    write_wav(tmp_path / "other.wav", tone(300), rate=16000)
    with pytest.raises(DataError, match=r"other.wav has 16000 samples per second, expected 8000"):
        trained.read_inputs(tmp_path / "other.wav")


def test_spectrograms_show_features_and_predictions(trained_cnn):
    _, recorder = trained_cnn
    pictures = recorder.pictures["spectrograms"]
    tables = recorder.texts["spectrograms/predictions"]
    assert len(pictures) == len(tables) == 8, "one an epoch"
    # 4 in a row of 350 pixels, each 56 wide and 54 high, with two lines of text below
    assert pictures[-1].shape == (1, 3, 2 * (54 + 38), 350)
    assert 0 <= pictures[-1].min() < pictures[-1].max() <= 1
    corners = torch.cat(pictures)[:, :, 4::92, 4::87].flatten(2)[:, :, :6]
    green = (corners[:, 1] > corners[:, 0]).flatten()
    rows = []
    for table in tables:
        rows += [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert green.tolist() == [row[1] == row[2] for row in rows]
    assert green[:6].sum() < green[-6:].sum(), "more are right at the end than after an epoch"
    assert {row[1] for row in rows} <= set(PITCH)
    data = fw.datasets.build("tones")
    samples = [0, 18, 36, 53, 71, 89]
    assert [row[1] for row in rows[:6]] == [data.classes[data.val[n][1]] for n in samples]


def test_the_spectrogram_of_a_sample_without_a_prediction_is_red():
    recorder = Recorder()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    model[1].bias.data[0] = torch.nan
    callback = fw.callbacks.build("spectrograms", samples=1)
    trainer = fw.Trainer(max_steps=1, callbacks=[callback], loggers=[recorder])
    sounds = fw.TensorSplit(torch.rand(4, 2, 6), torch.zeros(4, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    task = torch.nn.CrossEntropyLoss()
    trainer.fit(model, sounds, val=sounds, task=task, optimizer=optimizer)
    assert "| 1 | 0 | NaN | nan |" in recorder.texts["spectrograms/predictions"][0]
    red, green, _ = recorder.pictures["spectrograms"][0][0, :, 4, 4]
    assert red > green


def test_the_table_of_spectrograms_shows_the_names_of_classes_as_they_are(tmp_path):
    names = ["_background_noise_", "*", "yes"]
    (tmp_path / "facts.json").write_text(json.dumps({"classes": names}))
    recorder = Recorder()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([0.0, 9.0, 0.0])
    callback = fw.callbacks.build("spectrograms", samples=1)
    trainer = fw.Trainer(max_steps=1, callbacks=[callback], loggers=[recorder], folder=tmp_path)
    sounds = fw.TensorSplit(torch.rand(4, 2, 6), torch.zeros(4, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    task = torch.nn.CrossEntropyLoss()
    trainer.fit(model, sounds, val=sounds, task=task, optimizer=optimizer)
    (table,) = recorder.texts["spectrograms/predictions"]
    shown = MarkdownIt().enable("table").render(table)
    assert f"<td>{names[0]}</td>\n<td>{names[1]}</td>" in shown


@pytest.mark.parametrize(
    ("name", "expected"), [("spectrograms", "one class"), ("text_samples", "text data")]
)
def test_other_data_is_an_error_before_the_first_step(name, expected):
    data = fw.datasets.build("friedman1", samples=40)
    trainer = fw.Trainer(max_steps=1, callbacks=[fw.callbacks.build(name)])
    model = torch.nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(fw.SettingError, match=rf"callbacks\.{name}: expected .*{expected}"):
        trainer.fit(model, data, task=torch.nn.MSELoss(), optimizer=optimizer)
    assert trainer.state.step == 0
