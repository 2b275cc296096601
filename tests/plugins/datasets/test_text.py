"""Texts as inputs: tokenizers, ragged batches, data sets, and models that ignore padding."""

import copy
import json

import pytest
import torch
from torch import nn

import framework as fw
from framework.data.dataset import Loader, RaggedSplit
from framework.errors import DataError
from framework.registry.registry import Registry
from framework.runtime import seeds
from framework_plugins.datasets.readers.fetched import cache_folder

TEXTS = ["def f(x):\n    return x + 1  # größer als 1 €\n", "class A:\n    pass\n", "The end."] * 5
MODELS = ["embedding_bag", "text_lstm", "text_transformer"]


def tokenizer(name, **settings):
    if name == "bpe":
        pytest.importorskip("tokenizers")
    fitted = Registry.every["tokenizer"].build(name, **settings)
    fitted.fit(TEXTS)
    return fitted


# tokenizers


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_decoded_ids_are_the_text_and_count_its_characters(name):
    made = tokenizer(name)
    for text in TEXTS:
        ids = made.encode(text)
        assert made.decode(ids) == made.decode([*ids, 0, 0]) == text
        characters = made.characters()
        assert len(characters) == made.size
        assert min(ids) >= 2
        assert sum(characters[number] for number in ids) == len(text)


@pytest.mark.parametrize("name", ["byte", "char", "word", "bpe"])
def test_the_state_of_a_tokenizer_is_json(name):
    made = tokenizer(name)
    again = Registry.every["tokenizer"].build(name)
    again.load(json.loads(json.dumps(made.state())))
    assert again.size == made.size
    for text in TEXTS:
        assert again.encode(text) == made.encode(text)
    assert tokenizer(name).state() == made.state()  # a resumed run fits it again


def test_the_vocabulary_is_the_most_frequent_and_the_rest_is_unknown():
    made = Registry.every["tokenizer"].build("word", vocabulary=4)
    made.fit(["b b a a A, c", "c b"])
    assert made.tokens == ["a", "b"]  # three each, in alphabetic order; c only twice
    assert made.encode("A b c d") == [2, 3, 1, 1]
    assert made.decode([2, 3, 1, 0]) == "a b �"


def test_byte_pairs_are_longer_than_bytes_and_split_no_known_word():
    made = tokenizer("bpe", vocabulary=400)
    assert made.size <= 400
    assert len(made.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert len(made.encode("<unknown>")) > 1  # an ordinary text


# ragged batches


def ragged(count=57, bucket=4):
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 40, (count,), generator=draw).tolist()
    rows = [torch.randint(1, 99, (length,), generator=draw) for length in lengths]
    return RaggedSplit(rows, torch.arange(count), bucket=bucket), rows


def test_a_batch_is_its_texts_padded_to_the_longest():
    split, rows = ragged()
    for tokens, labels in Loader(split, batch_size=5, shuffle=True).epoch(1):
        assert tokens.dtype == torch.int64
        assert tokens.shape[1] == max(len(rows[label]) for label in labels)
        for row, label in zip(tokens, labels, strict=True):
            padding = tokens.shape[1] - len(rows[label])
            assert torch.equal(row, nn.functional.pad(rows[label], (0, padding)))
    assert torch.equal(split[56][0], rows[56])


def test_the_order_of_buckets_matches_its_definition():
    split, rows = ragged()
    plain = seeds.order(7, 2, 57).tolist()
    size = 5
    pool = 4 * size
    batches = []
    for start in range(0, 55, pool):
        chosen = sorted(plain[start : min(start + pool, 55)], key=lambda row: len(rows[row]))
        batches += [chosen[at : at + size] for at in range(0, len(chosen), size)]
    mixed = torch.randperm(11, generator=seeds.generator(7, "batches", 2)).tolist()
    expected = []
    for number in mixed:
        expected += batches[number]
    expected += plain[55:]
    assert split.order(7, 2, size, True).tolist() == expected
    assert sorted(expected) == list(range(57))
    assert split.order(7, 3, size, True).tolist() != expected


def test_buckets_reduce_padding_and_evaluation_keeps_the_order():
    def padding(bucket):
        split, _ = ragged(570, bucket)
        batches = Loader(split, batch_size=8, shuffle=True).epoch(0)
        return sum(int((tokens == 0).sum()) for tokens, _ in batches)

    assert padding(16) < padding(0) / 3
    split, _ = ragged()
    labels = []
    for _, batch in Loader(split, eval_batch_size=8).epoch(0):
        labels += batch.tolist()
    assert labels == list(range(57))


@pytest.mark.parametrize("start", [0, 3, 11, 12])
def test_an_epoch_continues_at_any_batch(start):
    loader = Loader(ragged()[0], batch_size=5, shuffle=True, seed=2)
    epoch = list(loader.epoch(1))
    rest = list(loader.epoch(1, start))
    assert len(rest) == 12 - start
    for expected, batch in zip(epoch[start:], rest, strict=True):
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])


def test_ragged_splits_that_cannot_be_loaded_are_refused():
    with pytest.raises(DataError, match="sequence 1 is empty"):
        RaggedSplit([torch.ones(2), torch.ones(0)])
    with pytest.raises(
        DataError, match=r"loader.read=workers: a RaggedSplit builds its batches in memory"
    ):
        Loader(ragged()[0], read="workers")


# models


def build(name, **settings):
    torch.manual_seed(1)
    model = fw.models.build(name, (20,), (3,), vocabulary=50, **settings)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.2)  # a branch that starts at zero has no effect
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_the_output(name):
    model = build(name, **({"pairs": True} if name == "embedding_bag" else {}))
    text = torch.randint(2, 50, (1, 7))
    alone = model(text)
    padded = nn.functional.pad(text, (0, 9))
    other = torch.randint(2, 50, (1, 16))
    torch.testing.assert_close(model(torch.cat([padded, other]))[:1], alone, atol=1e-5, rtol=1e-5)
    assert model(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()
    torch.testing.assert_close(
        model(text.where(text != text[0, 0], 777)), model(text.where(text != text[0, 0], 1))
    )


def test_an_embedding_bag_is_the_mean_of_words_and_of_pairs():
    model = build("embedding_bag", pairs=True, width=8)
    text = torch.tensor([[4, 9, 4]])
    words = model.words.table.weight
    pairs = model.pairs.weight
    hashed = [(4 * 92_821 + 9) % 50_000, (9 * 92_821 + 4) % 50_000]
    mean = (words[4] + words[9] + words[4]) / 3 + (pairs[hashed[0]] + pairs[hashed[1]]) / 2
    torch.testing.assert_close(model(text)[0], model.output(mean))


def test_an_lstm_reads_backwards_from_the_last_word():
    model = build("text_lstm", width=8, embedding=8)
    text = torch.randint(2, 50, (1, 6))
    x = model.words(text)
    forwards = model.forwards(x).mean(1)
    backwards = model.backwards(x.flip(1)).mean(1)
    expected = model.output(torch.cat([forwards, backwards], 1))
    torch.testing.assert_close(model(text), expected)


def test_a_transformer_is_pytorchs_attention_with_a_key_padding_mask():
    block = fw.blocks.build("rotary_attention", (6, 8), heads=2, causal=False)
    nn.init.normal_(block.output.weight)
    block.rotary.cos.fill_(1.0)  # no rotation
    block.rotary.sin.fill_(0.0)
    x = torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    reference = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    reference.in_proj_weight.data = block.input.weight.data
    reference.out_proj.weight.data = block.output.weight.data
    expected = reference(x, x, x, key_padding_mask=~mask)[0]
    torch.testing.assert_close(block(x, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)


# data sets

ANIMALS = {
    "cat": ["the cat says miau", "miau miau on the sofa", "a cat sleeps"],
    "dog": ["bow wow", "the dog barks bow"],
}


@pytest.fixture
def folder(tmp_path):
    for name, texts in ANIMALS.items():
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number, text in enumerate(texts * 10):
            (tmp_path / "texts" / name / f"{number}.txt").write_text(f"{text} {number}")
    return tmp_path / "texts"


def table_of(folder, path):
    lines = [] if path.suffix == ".jsonl" else ["text,label"]
    for file in sorted(folder.glob("*/*.txt")):
        row = {"text": file.read_text(), "label": file.parent.name}
        lines.append(
            json.dumps(row) if path.suffix == ".jsonl" else '"{text}",{label}'.format(**row)
        )
    path.write_text("\n".join(lines))
    return path


def test_folders_and_tables_are_the_same_data(folder, tmp_path):
    one = fw.datasets.build("text_folder", path=folder, max_length=4)
    assert (one.in_shape, one.out_shape, one.classes) == ((4,), (2,), ["cat", "dog"])
    assert [len(split) for split in (one.train, one.val, one.test)] == [36, 7, 7]
    for name in ("t.csv", "t.jsonl"):
        other = fw.datasets.build(
            "text_table", path=table_of(folder, tmp_path / name), max_length=4
        )
        assert torch.equal(other.train.tokens, one.train.tokens)
        assert torch.equal(other.test.others[0], one.test.others[0])
    assert set(one.tokenizer.tokens) <= set(" ".join(one.texts["train"]).split())


def test_inputs_to_predict_are_prepared_as_in_training(folder, tmp_path):
    data = fw.datasets.build("text_folder", path=folder, max_length=6)
    facts = json.loads(json.dumps(data.facts()))
    (tmp_path / "new.txt").write_text(data.texts["train"][3] + "\n\nunseenword\n")
    read = type(data).read_inputs(tmp_path / "new.txt", facts)
    assert read.shape == (3, 6)
    tokens = data.train[3][0]
    assert torch.equal(read[0, : len(tokens)], tokens)
    assert read[1].tolist() == read[2].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text,label\nhello,a\n,b\n", r"t.csv, line 3: expected a text as 'text', got ''"),
        (
            "t.csv",
            "text,label\nhello\n",
            r"t.csv, line 2: expected as many cells",
        ),
        ("t.csv", "words,label\nhello,a\n", r"t.csv, line 2 has no 'text'; .*words"),
        ("t.csv", "text,label\n", r"t.csv has no rows"),
        ("t.csv", "text,label\nhello,a\n", r"there is only one class, 'a'"),
        ("t.jsonl", '{"text": "a", "label": "b"}\n{"text"\n', r"t.jsonl, line 2 is not JSON"),
        ("t.jsonl", "[1]\n", r"t.jsonl, line 1: expected an object"),
        (
            "t.jsonl",
            '{"text": ["a"], "label": "b"}\n',
            r"t.jsonl, line 1: expected a text as 'text', got \['a'\]",
        ),
        ("t.xls", "", r"t.xls: expected the suffix .csv, .tsv or .jsonl"),
    ],
)
def test_the_error_of_a_bad_row_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        fw.datasets.build("text_table", path=tmp_path / name)


def test_the_error_of_a_bad_folder_names_it(folder):
    (folder / "bird").mkdir()
    with pytest.raises(
        DataError, match=r"texts/bird has no .txt file; add some, or remove the folder"
    ):
        fw.datasets.build("text_folder", path=folder)
    (folder / "bird" / "1.txt").write_bytes(b"tweet \xff")
    with pytest.raises(DataError, match=r"bird/1.txt is not UTF-8 text \(byte 6\)"):
        fw.datasets.build("text_folder", path=folder)
    with pytest.raises(DataError, match="has no folders"):
        fw.datasets.build("text_folder", path=folder / "cat")


def test_the_error_of_missing_mails_has_the_command_to_fetch_them(tmp_path):
    with pytest.raises(
        DataError, match=r"scripts/fetch_data'? spam \(data=docstrings needs no file"
    ):
        fw.datasets.build("spam", folder=tmp_path)


def test_mails_are_subject_and_body_and_no_mail_is_in_two_splits(tmp_path):
    for group in ("easy-ham-1", "spam-1", "easy-ham-2", "hard-ham-1", "spam-2"):
        (tmp_path / group).mkdir()
        for number in range(9):
            text = f"From: x\nsubject: about {group[:4]} {number}\n\nbody"
            (tmp_path / group / f"{number}.json").write_text(json.dumps({"text": text}))
    data = fw.datasets.build("spam", folder=tmp_path)
    assert data.texts["train"][0] == "about easy 0\nbody"
    assert len(data.train) + len(data.val) == 18
    # Training has the other mails of the test groups.
    assert sorted(data.texts["test"]) == [f"about hard {number}\nbody" for number in range(9)]
    (tmp_path / "spam-1" / "3.json").write_text("{")
    with pytest.raises(DataError, match=r"3.json is not a mail"):
        fw.datasets.build("spam", folder=tmp_path)


# training


@pytest.fixture(scope="module")
def docstrings():
    return fw.datasets.build("docstrings", max_length=32)


def fit(model, data, resume=None, **limits):
    trainer = fw.Trainer(seed=3, **limits)
    loader = Loader(data.train, batch_size=32, shuffle=True, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    trainer.fit(model, loader, task=nn.CrossEntropyLoss(), optimizer=optimizer, resume=resume)
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_each_model_learns_the_package_of_a_docstring(docstrings, name):
    """The accuracy is twice that of always predicting the most frequent package."""
    torch.manual_seed(0)
    small = {"width": 32, "depth": 1} if name == "text_transformer" else {"width": 32}
    model = fw.models.build(
        name, docstrings.in_shape, docstrings.out_shape, vocabulary=docstrings.vocabulary, **small
    )
    trainer = fit(model, docstrings, max_steps=180)
    accuracy = trainer.evaluate(docstrings.test, metrics=[fw.metrics.build("accuracy")])[
        "test/accuracy"
    ]
    answers = torch.tensor(docstrings.labels["test"])
    assert accuracy > 2 * (answers == answers.mode().values).float().mean()


@pytest.mark.parametrize("name", MODELS)
def test_spam_is_recognised_on_a_part_of_the_mails(tmp_path, name):
    """Half of the test mails are ham; those of hard-ham-1 look like spam."""
    fetched_mails = cache_folder() / "spam"
    if not fetched_mails.is_dir():
        pytest.skip("the mails are not fetched")
    for group, count in {
        "easy-ham-1": 150,
        "spam-1": 150,
        "easy-ham-2": 90,
        "hard-ham-1": 10,
        "spam-2": 100,
    }.items():
        (tmp_path / group).mkdir()
        for file in sorted((fetched_mails / group).glob("*.json"))[:count]:
            (tmp_path / group / file.name).symlink_to(file)
    data = fw.datasets.build("spam", folder=tmp_path, max_length=48)
    torch.manual_seed(0)
    small = {"width": 32, "depth": 1} if name == "text_transformer" else {"width": 32}
    trainer = fit(
        fw.models.build(name, data.in_shape, data.out_shape, vocabulary=data.vocabulary, **small),
        data,
        max_steps=120,
    )
    values = trainer.evaluate(data.test, metrics=[fw.metrics.build("accuracy")])
    assert values["test/accuracy"] > 0.75


@pytest.mark.parametrize("name", MODELS)
def test_a_run_stopped_in_mid_epoch_resumes_exactly(docstrings, name):
    def fresh():
        torch.manual_seed(0)
        return fw.models.build(
            name, (32,), docstrings.out_shape, vocabulary=5000, width=16, dropout=0.3
        )

    unbroken = fit(fresh(), docstrings, max_steps=100)
    state = copy.deepcopy(fit(fresh(), docstrings, max_steps=37).state_dict())
    resumed = fit(fresh(), docstrings, resume=state, max_steps=100)
    weights = resumed.model.state_dict()
    for key, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_a_text_file_is_predicted_from_the_command_line(command, folder):
    table_of(folder, folder.parent / "t.csv")
    model = "model=embedding_bag model.vocabulary=50"
    settings = "optimizer.lr=0.05 trainer.max_epochs=10 loggers=json_lines run.name=a"
    status, _, err = command(f"train data=text_table data.path=t.csv {model} {settings}")
    assert status == 0, err
    (folder.parent / "new.txt").write_text("miau miau\nbow wow bow\n")
    status, out, err = command("predict runs/default/a --input new.txt --output -")
    assert status == 0, err
    assert [line.split(",")[:2] for line in out.splitlines()] == [
        ["row", "class"],
        ["1", "cat"],
        ["2", "dog"],
    ]
