"""Language models: windows, rotary positions, the cache, sampling, bits per character, learning."""

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
from framework_plugins.datasets.readers.fetched import cache_folder

LANGUAGE = importlib.import_module("framework_plugins.tasks.language_modelling")
TEXT = "".join(f"if x == {n % 7}:\n    y = {n % 5} + x\n" for n in range(400))


# windows


def test_an_epoch_contains_the_text_in_windows_from_a_random_start():
    split = WindowSplit(torch.arange(103), 10)
    loader = Loader(split, batch_size=4, shuffle=True, seed=5)
    assert len(split) == 9
    starts = set()
    for epoch in range(80):
        batches = list(loader.epoch(epoch))
        inputs = torch.cat([batch[0] for batch in batches])
        targets = torch.cat([batch[1] for batch in batches])
        assert torch.equal(targets, inputs + 1)
        first = int(inputs.min())
        assert sorted(inputs.flatten().tolist()) == list(range(first, first + 90))
        order = seeds.order(5, epoch, 9)
        assert inputs[:, 0].tolist() == (order * 10 + first).tolist()
        starts.add(first)
    assert starts == set(range(10))


def test_an_epoch_of_windows_can_be_resumed():
    loader = Loader(WindowSplit(torch.arange(103), 10), batch_size=4, shuffle=True, seed=5)
    batches = [inputs for inputs, _ in loader.epoch(3)]
    resumed = [inputs for inputs, _ in loader.epoch(3, 1)]
    for inputs, expected in zip(resumed, batches[1:], strict=True):
        assert torch.equal(inputs, expected)
    assert loader.indices(3, 1, 1) == batches[1][:, 0].tolist()


@pytest.mark.parametrize("size", [20, 21, 29, 50, 51, 103])
@pytest.mark.parametrize("context", [0, 1, 5, 9])
def test_evaluation_windows_count_each_token_once_with_enough_context(size, context):
    split = WindowSplit(torch.arange(size), 10, context)
    counted = []
    for inputs, targets in Loader(split, eval_batch_size=3).epoch():
        for row, row_targets in zip(inputs, targets, strict=True):
            kept = row_targets[row_targets >= 0]
            assert torch.equal(kept, row[row_targets >= 0] + 1)
            before = kept - row[0]
            assert row[0] == 0 or (before >= context).all()
            counted += kept.tolist()
    assert counted == list(range(1, size))


def test_windows_of_invalid_size_are_errors():
    with pytest.raises(DataError, match=r"19 tokens .*: 20 "):
        WindowSplit(torch.arange(19), 10)
    with pytest.raises(DataError, match="0 to 9 tokens, not 10"):
        WindowSplit(torch.arange(50), 10, 10)


# the model


def decoder(context=12, vocabulary=30, **settings):
    torch.manual_seed(2)
    model = fw.models.build(
        "decoder", (context,), (context, vocabulary), width=16, depth=2, heads=2, **settings
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)  # the branches are zero at first
    return model.eval()


def test_rotary_positions_are_complex_rotations():
    """Su et al. 2021, section 3.2: pairs are complex numbers, times e^(i m θ).

    A pair consists of the features i and i + D/2.
    """
    block = fw.blocks.build("rotary_attention", (9, 8), heads=1, base=100.0)
    x = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    theta = torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    rotated = pairs * torch.exp(1j * torch.arange(3, 8)[:, None] * theta)
    expected = torch.cat([rotated.real, rotated.imag], -1)
    torch.testing.assert_close(block.rotary.double()(x, start=3), expected, atol=1e-6, rtol=1e-6)


def test_attention_depends_on_distances_only():
    block = fw.blocks.build("rotary_attention", (40, 16), heads=2)
    query, key = torch.randn(2, 8)

    def score(query_position, key_position):
        rotated_query = block.rotary(query[None], query_position)[0]
        return float(rotated_query @ block.rotary(key[None], key_position)[0])

    assert score(5, 2) == pytest.approx(score(30, 27), abs=1e-4)


def test_a_layer_equals_its_formula():
    layer = fw.blocks.build("gated_transformer", (6, 8), heads=2, hidden=5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 6, 8)

    def rms(v, scale):
        mean_square = v.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps
        return v / mean_square.sqrt() * scale

    rows = x + layer.attention(rms(x, layer.attention_norm.weight))
    value, gate = (rms(rows, layer.norm.weight) @ layer.input.weight.T).split(5, -1)
    expected = rows + (value * gate * torch.sigmoid(gate)) @ layer.output.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ngrams", [1, 4])
def test_a_position_depends_on_itself_and_earlier_positions(ngrams):
    model = decoder(ngrams=ngrams, buckets=40)
    tokens = torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 30
    same = torch.isclose(model(tokens), model(changed), atol=1e-6).all(-1)[0]
    assert same.tolist() == [True] * 7 + [False] * 5


def test_tied_weights_are_one_matrix_which_is_the_last():
    tied = decoder()
    untied = decoder(tied=False)
    tied_size = sum(p.numel() for p in tied.parameters())
    untied_size = sum(p.numel() for p in untied.parameters())
    assert untied_size - tied_size == 30 * 16
    matrices = [p for p in tied.parameters() if p.ndim > 1]
    assert matrices[-1] is tied.embedding.weight is tied.output.weight


def test_a_position_adds_the_vectors_of_the_pair_and_the_triple_that_end_there():
    model = decoder(ngrams=3, buckets=50)
    tokens = [5, 9, 5, 9]
    text = [0, 0, *tokens]
    expected = model.embedding.weight[tokens].clone()
    for at in range(4):
        pair = (text[at + 2] * 1_000_003 + text[at + 1] + 2) % (2**31 - 1)
        triple = (pair * 1_000_003 + text[at] + 3) % (2**31 - 1)
        expected[at] += model.ngrams.table.weight[[pair % 50, triple % 50]].sum(0)
    torch.testing.assert_close(model.embed(torch.tensor([tokens]), [])[0], expected)


def test_the_table_of_ngrams_is_the_first_matrix_for_optimizer_embedding():
    model = decoder(ngrams=3, buckets=50)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    assert matrices[0] is model.ngrams.table.weight


def test_invalid_sequences_and_heads_are_errors():
    with pytest.raises(DataError, match=r"13 tokens .* context of 12"):
        decoder()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(BuildError, match="even number of features per head, got 5"):
        fw.blocks.build("rotary_attention", (4, 10), heads=2)
    with pytest.raises(BuildError, match=r"10 features .* 4 heads"):
        fw.blocks.build("rotary_attention", (4, 10), heads=4)


# sampling


@pytest.mark.parametrize("ngrams", [1, 4])
def test_logits_with_a_cache_equal_those_without(ngrams):
    model = decoder(ngrams=ngrams, buckets=40)
    tokens = torch.randint(30, (2, 12))
    cache = model.new_cache()
    parts = [model(part, cache) for part in tokens.split([5, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ngrams", [1, 4])
@pytest.mark.parametrize("prompt", [[], [3, 4, 5], list(range(25))])
def test_sampling_with_a_cache_gives_the_same_tokens_also_beyond_the_context(prompt, ngrams):
    model = decoder(ngrams=ngrams, buckets=40).train()
    random_state = torch.get_rng_state()
    cached = LANGUAGE.sample(model, prompt, 12, length=30, seed=4)
    assert cached == LANGUAGE.sample(model, prompt, 12, length=30, seed=4, cached=False)
    assert cached != LANGUAGE.sample(model, prompt, 12, length=30, seed=5)
    assert len(cached) == 30
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training


def test_greedy_sampling_selects_the_most_likely_token_and_drops_half_of_a_full_context():
    model = decoder()
    text = [3, 4, 5]
    start = 0
    for _ in range(14):
        if len(text) - start > 12:
            start += 6
        text.append(int(model(torch.tensor([text[start:]]))[0, -1].argmax()))
    assert LANGUAGE.sample(model, [3, 4, 5], 12, length=14, temperature=0) == text[3:]


LOGITS = torch.tensor([0.1, 2.0, 1.0, -1.0, 1.5])
BEST_TWO = torch.tensor([-math.inf, 2.0, -math.inf, -math.inf, 1.5])


def frequencies(**settings):
    """Return how often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    counts = torch.zeros(len(LOGITS))
    for _ in range(4000):
        counts[LANGUAGE.draw_token(LOGITS, **settings, generator=generator)] += 1
    return counts / 4000


@pytest.mark.parametrize(
    ("settings", "logits"),
    [
        ({}, LOGITS),
        ({"temperature": 0.5}, LOGITS * 2),
        ({"top_k": 2}, BEST_TWO),
        ({"top_p": 0.6}, BEST_TWO),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_their_probabilities(settings, logits):
    probabilities = LOGITS.softmax(0)
    assert probabilities[1] < 0.6 < probabilities[1] + probabilities[4], "top_p=0.6 needs two"
    torch.testing.assert_close(frequencies(**settings), logits.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"top_k": 1}])
def test_the_most_likely_token_is_always_included(settings):
    assert frequencies(**settings)[1] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, r"top_p=1.5: .*\(0, 1\]"),
    ],
)
def test_invalid_sampling_settings_are_errors(settings, message):
    with pytest.raises(SettingError, match=message):
        LANGUAGE.sample(decoder(), [1], 12, **settings)


# metrics


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
def test_bits_per_character_do_not_depend_on_tokens_windows_and_batches(text_file, tokenizer):
    data = text_data(text_file, tokenizer)
    assert data.held_out == TEXT[-len(data.held_out) :]
    model = fw.models.build("decoder", data.in_shape, data.out_shape, width=16, depth=1, heads=2)
    task = fw.tasks.build("language_modelling")
    task.check(data)
    measures = [fw.metrics.build(name) for name in ("bits_per_character", "token_perplexity")]
    trainer = fw.Trainer(max_steps=1)
    values = trainer.evaluate(data.test, model=model, task=task, metrics=measures, batch_size=7)

    tokens = data.test.tokens.long()
    total = 0.0  # -log p of the text
    done = 0
    while done < len(tokens) - 1:  # windows of 32 that share 8; the last one ends with the text
        start = min(max(done - 8, 0), len(tokens) - 33)
        logits = model(tokens[None, start : start + 32])[0].detach()
        losses = F.cross_entropy(logits, tokens[start + 1 : start + 33], reduction="none")
        total += float(losses[done - start :].sum())
        done = start + 32
    characters = len(data.held_out) - int(data.characters[tokens[0]])
    bits_per_character = total / math.log(2) / characters
    assert values["test/bits_per_character"] == pytest.approx(bits_per_character, rel=1e-4)
    assert values["test/loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-4)
    assert values["test/perplexity"] == pytest.approx(math.exp(values["test/loss"]), rel=1e-4)


def test_the_n_gram_baseline_equals_its_definition():
    script = Path(fw.__file__).parent.parent / "scripts" / "baselines" / "ngram.py"
    spec = importlib.util.spec_from_file_location("ngram", script)
    ngram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ngram)
    train = "abracadabra abrakadabra"
    test = "abrakad zb"
    ids = {sign: number for number, sign in enumerate(sorted(set(train + test)), 2)}

    def witten_bell(before, sign):
        if before is None:
            return 1 / 20
        after = Counter()
        for at, following in enumerate(train):
            if ("\0" * 3 + train[:at]).endswith(before):
                after[following] += 1
        shorter = witten_bell(before[1:] if before else None, sign)
        if not after:
            return shorter
        return (after[sign] + len(after) * shorter) / (after.total() + len(after))

    def encode(text):
        return np.array([ids[sign] for sign in text], np.uint64)

    padded = "\0\0" + test
    expected = [witten_bell(padded[at : at + 2], sign) for at, sign in enumerate(test)]
    probabilities = ngram.probabilities(encode(train), encode(test), 3, 20)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)


# learning


def fit(data, resume=None, dropout=0.0, ngrams=1, **settings):
    torch.manual_seed(0)
    model = fw.models.build(
        "decoder",
        data.in_shape,
        data.out_shape,
        width=32,
        depth=1,
        heads=2,
        dropout=dropout,
        ngrams=ngrams,
        buckets=500,
    )
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
    path = cache_folder() / "bible" / "kjv.txt"
    if not path.is_file():
        pytest.skip("the Bible is not fetched")
    (folder / "kjv.txt").write_text(path.read_text()[:300_000])
    return fw.datasets.build("bible", path=folder / "kjv.txt", measured=20_000, **settings)


def unigram_bits(data):
    """Return the bits per character of the test text for the frequencies of the training text."""
    counts = Counter(data.fitted_on)
    size = len(data.fitted_on) + len(counts) + 1  # one more of each, so that none is impossible
    bits = [-math.log2((counts[sign] + 1) / size) for sign in data.held_out]
    return sum(bits) / len(bits)


@pytest.mark.parametrize(
    ("text", "tokenizer", "ngrams"),
    [
        (standard_library, "char", 1),
        (standard_library, "char", 5),
        (bible, {"name": "bpe", "vocabulary": 400}, 3),
    ],
)
def test_a_small_model_learns_more_than_character_frequencies(text, tokenizer, ngrams, tmp_path):
    if tokenizer != "char":
        pytest.importorskip("tokenizers")
    data = text(tmp_path, tokenizer=tokenizer, length=64)
    trainer = fit(data, max_steps=120, ngrams=ngrams)
    values = trainer.evaluate(data.test, metrics=[fw.metrics.build("bits_per_character")])
    assert values["test/bits_per_character"] < unigram_bits(data) - 1


@pytest.mark.parametrize(
    ("tokenizer", "ngrams"), [("char", 1), ("char", 3), ({"name": "bpe", "vocabulary": 280}, 1)]
)
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_run(text_file, tokenizer, ngrams):
    data = text_data(text_file, tokenizer)
    uninterrupted = fit(data, max_steps=40, dropout=0.1, ngrams=ngrams)
    state = copy.deepcopy(fit(data, max_steps=23, dropout=0.1, ngrams=ngrams).state_dict())
    resumed = fit(data, resume=state, max_steps=40, dropout=0.1, ngrams=ngrams)
    assert uninterrupted.state.steps_per_epoch not in (1, 23, 40)
    assert_same_state(resumed.model, uninterrupted.model)


def assert_same_state(model, expected):
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


TRAIN = (
    "train task=language_modelling 'metrics=[bits_per_character,token_perplexity]' "
    "data=plain_text data.path=text.txt data.length=32 optimizer.lr=0.02 "
    "trainer.max_steps=120 trainer.validate_every=60steps loggers=json_lines run.name=a"
)
DECODER = "model=decoder model.width=32 model.depth=1 optimizer=muon"
RNN = "model=rnn model.pool=none model.vocabulary=100 optimizer=adamw"


@pytest.mark.parametrize("model", [DECODER, RNN])
def test_a_run_continues_a_prompt(command, text_file, model):
    status, _, err = command(f"{TRAIN} {model}")
    assert status == 0, err
    predict = "predict runs/default/a --prompt 'if x == ' --length 40 --temperature 0.5"
    status, out, err = command(predict)
    assert status == 0, err
    assert out.startswith("if x == ")
    assert len(out) == len("if x == ") + 40 + 1
    assert command(predict)[1] == out
    if model == DECODER:
        assert "y = " in out
        check_other_prompts(command)


def check_other_prompts(command):
    """Try a prompt longer than the context of 32 tokens, an unknown character, an empty prompt."""
    long = "if x == 3: " * 20
    greedy = "--length 40 --temperature 0"
    status, out, err = command(f"predict runs/default/a --prompt '{long}' {greedy}")
    assert (status, out[: len(long)], len(out)) == (0, long, len(long) + 40 + 1), err
    _, other, _ = command(f"predict runs/default/a --prompt 'y{long[1:]}' {greedy}")
    assert other == f"y{out[1:]}", "tokens before the window have no effect"
    status, out, err = command("predict runs/default/a --prompt 'if é == ' --length 10")
    assert (status, out[:8]) == (0, "if � == "), err
    assert "'if � == '" in err
    status, out, err = command("predict runs/default/a --prompt '' --length 10")
    assert (status, len(out)) == (0, 10 + 1), err


class Texts(fw.Logger):
    def __init__(self):
        self.logged = []

    def text(self, tag, markdown, step=0):
        self.logged.append((tag, markdown, step))


def test_text_samples_are_logged_and_do_not_change_training(text_file):
    data = text_data(text_file, "char")
    plain = fit(data, max_steps=20)
    logger = Texts()
    settings = {"prompt": "if x", "every": "10steps", "length": 20}
    samples = fw.callbacks.build("text_samples", **settings)
    with_samples = fit(data, max_steps=20, callbacks=[samples], loggers=[logger])
    assert [(tag, step) for tag, _, step in logger.logged] == [("samples", 10), ("samples", 20)]
    assert all(markdown.startswith("    if x") for _, markdown, _ in logger.logged)
    assert_same_state(with_samples.model, plain.model)


# errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "predict runs/default/a --prompt x --input y --output -",
            "give --input FILE --output FILE, or --prompt TEXT",
        ),
        ("predict runs/default/a", "give --input FILE --output FILE, or --prompt TEXT"),
        ("predict runs/default/a --input x.npz --output - --top-k 3", "--top-k requires --prompt"),
        ("predict runs/default/a --prompt x", "Digits has no text to continue"),
        ("train task=language_modelling data=friedman1", "Friedman1 contains no tokens"),
        (
            "train task=classification data=stdlib_source data.characters=9999 data.length=40",
            "has nothing as targets",
        ),
        (
            "train data=plain_text data.path=nope task=language_modelling",
            "nope: no such file (looked in ",
        ),
        ("train data=bible data.path=nope task=language_modelling", " bible (data=stdlib_source"),
        (
            "train data=stdlib_source data.tokenizer=word task=language_modelling",
            "use data.tokenizer=char, byte",
        ),
    ],
)
def test_an_error_is_a_line(command, line, message):
    if "runs/default/a" in line:
        status, _, err = command(
            "train model.width=8 trainer.max_steps=2 loggers=json_lines run.name=a"
        )
        assert status == 0, err
    status, _, err = command(line)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) <= 2


def test_facts_are_json_and_enough_to_encode_and_decode(text_file):
    data = text_data(text_file, {"name": "bpe", "vocabulary": 280})
    facts = json.loads(json.dumps(data.facts()))
    tokens = type(data).encode("if x == 3:", facts)
    assert type(data).decode(tokens.tolist(), facts) == "if x == 3:"
