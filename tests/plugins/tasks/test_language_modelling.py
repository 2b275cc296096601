"""Language models: windows, rotary positions, the cache, drawing, bits per character, and that they learn."""

import copy
import importlib
import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import framework as fw
from framework.data.dataset import Loader, WindowSplit
from framework.errors import BuildError, DataError, SettingError
from framework.runtime import seeds
from framework_plugins.datasets.readers.arrays import cache_folder

LANGUAGE = importlib.import_module("framework_plugins.tasks.language_modelling")
TEXT = "".join(f"if x == {n % 7}:\n    y = {n % 5} + x\n" for n in range(400))


# --- windows ----------------------------------------------------------------------------------------------------------


def test_an_epoch_is_the_text_in_windows_from_a_drawn_start():
    split = WindowSplit(torch.arange(103), 10)
    loader = Loader(split, batch_size=4, shuffle=True, seed=5)
    assert len(split) == 9
    starts = {}
    for epoch in range(80):
        inputs, targets = (torch.cat(parts) for parts in zip(*loader.epoch(epoch), strict=True))
        assert torch.equal(targets, inputs + 1)
        first = int(inputs.min())
        assert sorted(inputs.flatten().tolist()) == list(range(first, first + 90))
        order = seeds.order(5, epoch, 9)
        assert inputs[:, 0].tolist() == (order * 10 + first).tolist()
        starts[epoch] = first
    assert set(starts.values()) == set(range(10))
    assert [int(x[0, 0]) for x, _ in loader.epoch(3, 1)] == [
        int(x[0, 0]) for x, _ in loader.epoch(3)
    ][1:]
    assert loader.indices(3, 1, 1) == [int(x) for x in list(loader.epoch(3))[1][0][:, 0]]


@pytest.mark.parametrize("size", [20, 21, 29, 50, 51, 103])
@pytest.mark.parametrize("context", [0, 1, 5, 9])
def test_measured_windows_count_each_token_once_with_enough_before_it(size, context):
    split = WindowSplit(torch.arange(size), 10, context)
    counted = []
    for inputs, targets in Loader(split, eval_batch_size=3).epoch():
        for row, wanted in zip(inputs, targets, strict=True):
            kept = wanted[wanted >= 0]
            assert torch.equal(kept, row[wanted >= 0] + 1)
            before = kept - row[0]
            assert row[0] == 0 or (before >= context).all()
            counted += kept.tolist()
    assert counted == list(range(1, size))


def test_windows_that_do_not_fit():
    with pytest.raises(DataError, match="19 tokens are too few for windows of 10: 20 are needed"):
        WindowSplit(torch.arange(19), 10)
    with pytest.raises(DataError, match="can overlap by 0 to 9 tokens, not 10"):
        WindowSplit(torch.arange(50), 10, 10)


# --- the model --------------------------------------------------------------------------------------------------------


def decoder(context=12, vocabulary=30, **settings):
    torch.manual_seed(2)
    model = fw.models.build(
        "decoder", (context,), (context, vocabulary), width=16, depth=2, heads=2, **settings
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(
                parameter, std=0.3
            )  # branches begin at zero, which would hide what they do
    return model.eval()


def test_rotary_positions_are_the_complex_turns_of_the_paper():
    """Su et al. 2021, section 3.2: pairs as complex numbers times e^(i m θ); here a pair is features i and i + D/2."""
    block = fw.blocks.build("rotary_attention", (9, 8), heads=1, base=100.0)
    x = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    theta = torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turned = pairs * torch.exp(1j * torch.arange(3, 8)[:, None] * theta)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(block.rotary.double()(x, start=3), expected, atol=1e-6, rtol=1e-6)


def test_attention_depends_on_distances_alone():
    block = fw.blocks.build("rotary_attention", (40, 16), heads=2)
    query, key = torch.randn(2, 8)
    scores = [
        float(block.rotary(query[None], m)[0] @ block.rotary(key[None], n)[0])
        for m, n in ((5, 2), (30, 27))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_layer_is_its_formula():
    layer = fw.blocks.build("gated_transformer", (6, 8), heads=2, hidden=5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 6, 8)

    def rms(v, scale):
        return (
            v / (v.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * scale
        )

    rows = x + layer.attention(rms(x, layer.attention_norm.weight))
    value, gate = (rms(rows, layer.norm.weight) @ layer.input.weight.T).split(5, -1)
    expected = rows + (value * gate * torch.sigmoid(gate)) @ layer.output.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ngrams", [1, 4])
def test_a_position_sees_itself_and_those_before_it(ngrams):
    model, tokens = decoder(ngrams=ngrams, buckets=40), torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 30
    same = torch.isclose(model(tokens), model(changed), atol=1e-6).all(-1)[0]
    assert same.tolist() == [True] * 7 + [False] * 5


def test_tied_weights_are_one_matrix_and_the_last_one():
    tied, untied = decoder(), decoder(tied=False)
    assert (
        sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
        == 30 * 16
    )
    assert (
        [p for p in tied.parameters() if p.ndim > 1][-1]
        is tied.embedding.weight
        is tied.output.weight
    )


def test_a_position_has_the_vectors_of_the_pair_and_triple_that_end_there():
    model, tokens = decoder(ngrams=3, buckets=50), [5, 9, 5, 9]
    text, expected = [0, 0, *tokens], model.embedding.weight[tokens].clone()
    for at in range(4):
        pair = (text[at + 2] * 1_000_003 + text[at + 1] + 2) % (2**31 - 1)
        triple = (pair * 1_000_003 + text[at] + 3) % (2**31 - 1)
        expected[at] += model.ngrams.table.weight[[pair % 50, triple % 50]].sum(0)
    torch.testing.assert_close(model.embed(torch.tensor([tokens]), [])[0], expected)
    assert (
        next(p for p in model.parameters() if p.ndim > 1) is model.ngrams.table.weight
    )  # for optimizer.embedding


def test_what_the_model_cannot_take():
    with pytest.raises(
        DataError, match="a sequence of 13 tokens is longer than the model's context of 12"
    ):
        decoder()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(BuildError, match="even number of features per head, got 5"):
        fw.blocks.build("rotary_attention", (4, 10), heads=2)
    with pytest.raises(BuildError, match=r"10 features .* 4 heads"):
        fw.blocks.build("rotary_attention", (4, 10), heads=4)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ngrams", [1, 4])
def test_the_cache_gives_the_logits_of_the_whole(ngrams):
    model, tokens = decoder(ngrams=ngrams, buckets=40), torch.randint(30, (2, 12))
    cache = model.new_cache()
    parts = [model(part, cache) for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ngrams", [1, 4])
@pytest.mark.parametrize("prompt", [[], [3, 4, 5], list(range(25))])
def test_cached_writing_is_the_same_also_beyond_the_context(prompt, ngrams):
    model = decoder(ngrams=ngrams, buckets=40).train()
    before = torch.get_rng_state()
    cached = LANGUAGE.sample(model, prompt, 12, length=30, seed=4)
    assert cached == LANGUAGE.sample(model, prompt, 12, length=30, seed=4, cached=False)
    assert cached != LANGUAGE.sample(model, prompt, 12, length=30, seed=5)
    assert len(cached) == 30
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_greedy_writing_takes_the_likeliest_and_slides_by_half():
    model = decoder()
    text = [3, 4, 5]
    for _ in range(14):
        start = next(start for start in range(0, 99, 6) if len(text) - start <= 12)
        text.append(int(model(torch.tensor([text[start:]]))[0, -1].argmax()))
    assert LANGUAGE.sample(model, [3, 4, 5], 12, length=14, temperature=0) == text[3:]


def drawn(logits, **settings):
    draw = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    counts = Counter(LANGUAGE.choose(logits, **settings, draw=draw) for _ in range(4000))
    return torch.tensor([counts[number] / 4000 for number in range(len(logits))])


def test_tokens_are_drawn_as_they_should_be():
    logits = torch.tensor([0.1, 2.0, 1.0, -1.0, 1.5])
    close = {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(drawn(logits), logits.softmax(0), **close)
    torch.testing.assert_close(drawn(logits, temperature=0.5), (logits * 2).softmax(0), **close)
    best = torch.tensor([-math.inf, 2.0, -math.inf, -math.inf, 1.5])
    torch.testing.assert_close(drawn(logits, top_k=2), best.softmax(0), **close)
    shares = logits.softmax(0)  # 0.41 and 0.25 of the likeliest two
    assert shares[1] < 0.6 < shares[1] + shares[4]
    torch.testing.assert_close(drawn(logits, top_p=0.6), best.softmax(0), **close)
    assert drawn(logits, top_p=1e-6)[1] == drawn(logits, top_k=1)[1] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 1.5}, r"top_p 1.5 .*\(0, 1\]"),
    ],
)
def test_drawing_that_means_nothing(settings, message):
    with pytest.raises(SettingError, match=message):
        LANGUAGE.sample(decoder(), [1], 12, **settings)


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def text_data(path, tokenizer, **settings):
    if tokenizer != "char":
        pytest.importorskip("tokenizers")
    settings = {"length": 32, "test_fraction": 0.2, "val_fraction": 0.1} | settings
    return fw.datasets.build("plain_text", path=path, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("tokenizer", ["char", {"name": "bpe", "vocabulary": 280}])
def test_bits_per_character_are_those_of_the_whole_text(text_file, tokenizer):
    """Whatever the tokens, windows and batches: minus the sum of log₂ p over the characters that are predicted."""
    data = text_data(text_file, tokenizer)
    assert data.held_out == TEXT[-len(data.held_out) :]
    model = fw.models.build("decoder", data.in_shape, data.out_shape, width=16, depth=1, heads=2)
    task = fw.tasks.build("language_modelling")
    task.check(data)
    measures = [fw.metrics.build(name) for name in ("bits_per_character", "token_perplexity")]
    trainer = fw.Trainer(max_steps=1)
    values = trainer.evaluate(data.test, model=model, task=task, metrics=measures, batch_size=7)

    tokens, total, done = data.test.tokens.long(), 0.0, 0
    while done < len(tokens) - 1:  # windows of 32 that share 8; the last one ends with the text
        start = min(max(done - 8, 0), len(tokens) - 33)
        logits = model(tokens[None, start : start + 32])[0].detach()
        losses = F.cross_entropy(logits, tokens[start + 1 : start + 33], reduction="none")
        total, done = total + float(losses[done - start :].sum()), start + 32
    characters = len(data.held_out) - int(data.characters[tokens[0]])
    assert values["test/bits_per_character"] == pytest.approx(
        total / math.log(2) / characters, rel=1e-4
    )
    assert values["test/loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-4)
    assert values["test/perplexity"] == pytest.approx(math.exp(values["test/loss"]), rel=1e-4)


def test_n_grams_are_those_of_the_definition():
    script = Path(fw.__file__).parent.parent / "scripts" / "baselines" / "ngram.py"
    spec = importlib.util.spec_from_file_location("ngram", script)
    ngram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ngram)
    train, test = "abracadabra abrakadabra", "abrakad zb"
    ids = {sign: number for number, sign in enumerate(sorted(set(train + test)), 2)}

    def witten_bell(before, sign):
        if before is None:
            return 1 / 20
        history = ["\0" * 3 + train[:at] for at in range(len(train))]
        after = Counter(train[at] for at in range(len(train)) if history[at].endswith(before))
        shorter = witten_bell(before[1:] if before else None, sign)
        return (
            (after[sign] + len(after) * shorter) / (after.total() + len(after))
            if after
            else shorter
        )

    expected = [witten_bell(("\0\0" + test)[at : at + 2], sign) for at, sign in enumerate(test)]
    train, test = (np.array([ids[sign] for sign in text], np.uint64) for text in (train, test))
    np.testing.assert_allclose(ngram.probabilities(train, test, 3, 20), expected, rtol=1e-12)


# --- learning ---------------------------------------------------------------------------------------------------------


def fit(data, resume=None, dropout=0.0, ngrams=1, **settings):
    torch.manual_seed(0)
    small = {
        "width": 32,
        "depth": 1,
        "heads": 2,
        "dropout": dropout,
        "ngrams": ngrams,
        "buckets": 500,
    }
    model = fw.models.build("decoder", data.in_shape, data.out_shape, **small)
    task = fw.tasks.build("language_modelling")
    task.check(data)
    trainer = fw.Trainer(seed=1, **settings)
    optimizer = fw.optimizers.build("muon", model.parameters(), lr=0.02, embedding=ngrams > 1)
    loader = Loader(data.train, batch_size=8, shuffle=True, seed=1)
    trainer.fit(model, loader, task=task, optimizer=optimizer, resume=resume)
    return trainer


def standard_library(folder, **settings):
    return fw.datasets.build("stdlib_source", characters=300_000, measured=20_000, **settings)


def bible(folder, **settings):
    whole = cache_folder() / "bible" / "kjv.txt"
    if not whole.is_file():
        pytest.skip("the Bible is not fetched")
    (folder / "kjv.txt").write_text(whole.read_text()[:300_000])
    return fw.datasets.build("bible", path=folder / "kjv.txt", measured=20_000, **settings)


def unigram(data):
    """Return -log₂ p per character of the test text under the frequencies of the training text's characters."""
    counts = Counter(data.fitted_on)
    size = len(data.fitted_on) + len(counts) + 1  # one more of each, so that none is impossible
    return -sum(math.log2((counts[sign] + 1) / size) for sign in data.held_out) / len(data.held_out)


@pytest.mark.parametrize(
    ("text", "tokenizer", "ngrams"),
    [
        (standard_library, "char", 1),
        (standard_library, "char", 5),
        (bible, {"name": "bpe", "vocabulary": 400}, 3),
    ],
)
def test_a_small_model_learns_a_text_better_than_its_characters_frequencies(
    text, tokenizer, ngrams, tmp_path
):
    if tokenizer != "char":
        pytest.importorskip("tokenizers")
    data = text(tmp_path, tokenizer=tokenizer, length=64)
    trainer = fit(data, max_steps=120, ngrams=ngrams)
    values = trainer.evaluate(data.test, metrics=[fw.metrics.build("bits_per_character")])
    assert values["test/bits_per_character"] < unigram(data) - 1


@pytest.mark.parametrize(
    ("tokenizer", "ngrams"), [("char", 1), ("char", 3), ({"name": "bpe", "vocabulary": 280}, 1)]
)
def test_a_run_that_stops_in_mid_epoch_goes_on_bit_for_bit(text_file, tokenizer, ngrams):
    data = text_data(text_file, tokenizer)
    whole = fit(data, max_steps=40, dropout=0.1, ngrams=ngrams)
    state = copy.deepcopy(fit(data, max_steps=23, dropout=0.1, ngrams=ngrams).state_dict())
    resumed = fit(data, resume=state, max_steps=40, dropout=0.1, ngrams=ngrams)
    assert whole.state.steps_per_epoch not in (1, 23, 40)
    weights = resumed.model.state_dict()
    assert all(
        torch.equal(tensor, weights[key]) for key, tensor in whole.model.state_dict().items()
    )


SMALL = "task=language_modelling model=decoder model.width=32 model.depth=1 optimizer=muon optimizer.lr=0.02"
SMALL += " 'metrics=[bits_per_character,token_perplexity]' data=plain_text data.path=text.txt data.length=32"


@pytest.mark.parametrize(
    "model", ["", " model=rnn model.pool=none model.vocabulary=100 optimizer=adamw"]
)
def test_a_run_goes_on_with_a_prompt(command, text_file, model):
    more = "trainer.max_steps=120 trainer.validate_every=60steps loggers=json_lines run.name=a"
    line = (
        SMALL.replace("model=decoder model.width=32 model.depth=1 optimizer=muon ", "") + model
        if model
        else SMALL
    )
    status, _, err = command(f"train {line} {more}")
    assert status == 0, err
    status, out, err = command(
        "predict runs/default/a --prompt 'if x == ' --length 40 --temperature 0.5"
    )
    assert status == 0, err
    assert out.startswith("if x == ")
    assert len(out) == len("if x == ") + 40 + 1
    assert (
        command("predict runs/default/a --prompt 'if x == ' --length 40 --temperature 0.5")[1]
        == out
    )
    if not model:
        assert "y = " in out
        check_other_prompts(command)


def check_other_prompts(command):
    """Longer than the 32 tokens that the model sees at once; with a sign that it never saw; with nothing in it."""
    long = "if x == 3: " * 20
    status, out, err = command(
        f"predict runs/default/a --prompt '{long}' --length 40 --temperature 0"
    )
    assert (status, out[: len(long)], len(out)) == (0, long, len(long) + 40 + 1), err
    other = command(f"predict runs/default/a --prompt 'y{long[1:]}' --length 40 --temperature 0")[1]
    assert other == f"y{out[1:]}", "what lies before the window does not count"
    status, out, err = command("predict runs/default/a --prompt 'if é == ' --length 10")
    assert (status, out[:8]) == (0, "if � == "), err
    assert err == "framework: the model knows a part of the prompt only; it reads 'if � == '\n"
    status, out, err = command("predict runs/default/a --prompt '' --length 10")
    assert (status, len(out)) == (0, 10 + 1), err


class Texts(fw.Logger):
    def __init__(self):
        self.said = []

    def text(self, tag, markdown, step=0):
        self.said.append((tag, markdown, step))


def test_samples_are_shown_and_change_nothing(text_file):
    data = text_data(text_file, "char")
    plain = fit(data, max_steps=20)
    logger = Texts()
    settings = {"prompt": "if x", "every": "10steps", "length": 20}
    shown = fit(
        data,
        max_steps=20,
        callbacks=[fw.callbacks.build("text_samples", **settings)],
        loggers=[logger],
    )
    assert [(tag, step) for tag, _, step in logger.said] == [("samples", 10), ("samples", 20)]
    assert all(markdown.startswith("    if x") for _, markdown, _ in logger.said)
    weights = shown.model.state_dict()
    assert all(
        torch.equal(tensor, weights[key]) for key, tensor in plain.model.state_dict().items()
    )


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "predict runs/default/a --prompt x --input y --output -",
            "give --input FILE --output FILE, or --prompt TEXT",
        ),
        ("predict runs/default/a", "give --input FILE --output FILE, or --prompt TEXT"),
        ("predict runs/default/a --input x.npz --output - --top-k 3", "--top-k goes with --prompt"),
        ("predict runs/default/a --prompt x", "Digits holds no text to go on with"),
        ("train task=language_modelling data=friedman1", "Friedman1 holds no tokens"),
        (
            "train task=classification data=stdlib_source data.characters=9999 data.length=40",
            "has nothing as targets",
        ),
        (
            "train data=plain_text data.path=nope task=language_modelling",
            "nope: there is no such file",
        ),
        ("train data=bible data.path=nope task=language_modelling", " bible), or take"),
        (
            "train data=stdlib_source data.tokenizer=word task=language_modelling",
            "choose data.tokenizer=char, byte",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line(command, line, message):
    if "runs/default/a" in line:
        assert (
            command("train model.width=8 trainer.max_steps=2 loggers=json_lines run.name=a")[0] == 0
        )
    status, _, err = command(line)
    assert (status, message in err) == (2, True), err
    assert len(err.splitlines()) <= 2


def test_facts_are_plain_and_enough_to_read_and_write(text_file):
    data = text_data(text_file, {"name": "bpe", "vocabulary": 280})
    facts = json.loads(json.dumps(data.facts()))
    tokens = type(data).encode("if x == 3:", facts)
    assert type(data).decode(tokens.tolist(), facts) == "if x == 3:"
