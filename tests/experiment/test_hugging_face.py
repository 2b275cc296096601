"""Models and tokenizers of Hugging Face, with random weights and without the internet.

pip install -c scripts/constraints.txt transformers tokenizers
python -m pytest tests/experiment/test_hugging_face.py
scripts/fetch_data spam; python -m pytest -m slow -s tests/experiment/test_hugging_face.py
"""

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import framework as fw
from exports import measure, run_alone, save_case
from fits import Record
from framework import Trainer
from framework.experiment.experiment import Experiment
from framework.experiment.trained.load import open_run
from framework.runs import checkpoint
from runs import Stop, require_data

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PLUGIN = '''
import random

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import framework as fw

HAM = "meeting agenda notes lunch project patch kernel list thanks regards".split()
SPAM = "free money winner click offer credit cash guaranteed prize now".split()


def mails(count):
    draw = random.Random(0)
    texts = []
    for number in range(count):
        words = [*(SPAM if number % 2 else HAM), "the", "a", "and", "you"]
        texts.append(" ".join(draw.choices(words, k=draw.randint(4, 16))))
    return texts, [number % 2 for number in range(count)]


def train_tokenizer(texts, vocabulary=200):
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


class Mails(torch.utils.data.Dataset):
    """Samples of texts and labels, as dicts."""

    def __init__(self, encoding, labels):
        self.encoding = encoding
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        fields = {name: column[index] for name, column in self.encoding.items()}
        return {**fields, "labels": self.labels[index], "name": f"mail {index}"}


@fw.datasets.register("bert_mails")
class BertMails(fw.Data):
    """Mails with the classes ham and spam.

    Args:
        count: number of made-up mails; 0: the mails of data=spam.
        length: maximum number of tokens of a mail.
        vocabulary: maximum number of tokens that are known.
    """

    out_shape = (2,)
    classes = ("ham", "spam")

    def __init__(self, count: int = 80, length: int = 20, vocabulary: int = 200):
        self.in_shape = (length,)
        if count:
            texts, labels = mails(count)
            cut = count * 3 // 4
            parts = {"train": (texts[:cut], labels[:cut]), "val": (texts[cut:], labels[cut:])}
        else:
            spam = fw.datasets.build("spam")
            parts = {name: (texts, spam.labels[name]) for name, texts in spam.texts.items()}
        self.tokenizer = train_tokenizer(parts["train"][0], vocabulary)
        for name, (texts, labels) in parts.items():
            encoding = self.tokenizer(
                texts, padding="max_length", max_length=length, truncation=True,
                return_tensors="pt",
            )
            setattr(self, name, Mails(encoding, labels))

    def facts(self):
        return {"tokenizer": self.tokenizer.backend_tokenizer.to_str()}

    @classmethod
    def preparation(cls, facts, in_shape):
        length = fw.Axis("length", 2, in_shape[0])
        ids = fw.RawInput(torch.int64, (length,), "token ids of tokenizer.json")
        mask = fw.RawInput(torch.int64, (length,), "1 for a token, 0 for padding")
        preparation = fw.UnchangedInputs({"input_ids": ids, "attention_mask": mask})
        preparation.files = {"tokenizer.json": facts["tokenizer"]}
        preparation.imports = ("tokenizers",)
        preparation.example = ENCODE
        return preparation


ENCODE = """
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.enable_padding()
mails = open(file, encoding="utf-8").read().splitlines()
encoded = tokenizer.encode_batch(mails)
raw = {
    "input_ids": np.array([each.ids for each in encoded]),
    "attention_mask": np.array([each.attention_mask for each in encoded]),
}"""


@fw.models.register("bert")
class Bert(BertForSequenceClassification):
    """A small BERT."""

    def __init__(
        self, in_shape: fw.Shape, out_shape: fw.Shape, width: int = 16, depth: int = 1,
        vocabulary: int = 200,
    ):
        super().__init__(BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth,
            num_attention_heads=2, intermediate_size=2 * width,
            max_position_embeddings=in_shape[0], num_labels=out_shape[0],
        ))
'''
TASK = [
    "task.inputs=[input_ids,attention_mask]",
    "task.target=labels",
    "task.output=logits",
]
SETTINGS = ["data=bert_mails", "model=bert", "metrics=[accuracy]", "optimizer=adamw"]
SETTINGS += ["optimizer.lr=0.01", "loader.batch_size=16"]


@pytest.fixture(scope="module")
def parts():
    """Return the names of the plugin, without registering its parts."""
    names = {"__name__": "bert_mails"}
    code = PLUGIN.replace('@fw.datasets.register("bert_mails")\n', "")
    exec(code.replace('@fw.models.register("bert")\n', ""), names)
    return names


@pytest.fixture
def alone(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


def weights(run):
    last = max(Path("runs/default", run, "checkpoints").glob("step-*"))
    return checkpoint.load(last)[0]


def test_bert_on_the_command_line_resumes_bit_for_bit(command, forget_plugins, monkeypatch):
    Path("bert_mails.py").write_text(PLUGIN, encoding="utf-8")
    settings = shlex.join([*SETTINGS, *TASK, "callbacks.checkpoint.every=1step"])
    train = f"train --plugins bert_mails.py {settings} trainer.max_epochs=2"
    assert command(f"{train} run.name=whole")[0] == 0
    make = Experiment.trainer

    def stopped(*args):
        trainer = make(*args)
        trainer.callbacks.append(Stop(4))
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", stopped)
        assert command(f"{train} run.name=part")[0] != 0
    assert Path("runs/default/part/checkpoints/step-00000003").is_dir()
    assert not Path("runs/default/part/checkpoints/step-00000008").exists()
    status, _, err = command("resume runs/default/part --plugins bert_mails.py")
    assert status == 0, err
    expected = weights("whole")
    for name, tensor in weights("part").items():
        assert torch.equal(tensor, expected[name]), name
    status, out, err = command("eval runs/default/part --split val --plugins bert_mails.py")
    assert status == 0, err
    assert "val/accuracy" in out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("task.target=label", "task.target=label: there is no such field; a batch has input_ids"),
        ("task.inputs=[inputs]", "task.inputs=inputs: there is no such field"),
        ("task.output=null", "task.output=logits"),
        (
            "task.output=score",
            "task.output=score: there is no such field; the model's outputs have",
        ),
    ],
)
def test_wrong_fields_are_errors_before_training(command, forget_plugins, setting, said):
    Path("bert_mails.py").write_text(PLUGIN, encoding="utf-8")
    chosen = [*SETTINGS, *[each for each in TASK if setting[:8] not in each], setting]
    status, _, err = command(f"train --plugins bert_mails.py {shlex.join(chosen)}")
    assert status == 2
    assert said in err
    assert not Path("runs").exists()


def test_a_batch_encoding_and_a_model_output(parts):
    """A DataLoader with a collate function of a tokenizer, and the loss of the model."""
    texts, labels = parts["mails"](60)
    encode = parts["train_tokenizer"](texts)

    def collate(rows):
        batch = encode([texts[row] for row in rows], padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([labels[row] for row in rows])
        return batch

    def fitted(task, steps=12, resume=None, **settings):
        torch.manual_seed(0)
        model = parts["Bert"]((20,), (2,))
        loader = DataLoader(range(60), batch_size=10, collate_fn=collate)
        record = Record()
        trainer = Trainer(max_steps=steps, loggers=[record], log_every="1step", **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with trainer:
            trainer.fit(model, loader, task=task, optimizer=optimizer, resume=resume)
        return model, trainer, record, loader

    names = ["input_ids", "attention_mask"]
    task = fw.tasks.build("classification", inputs=names, target="labels", output="logits")
    model, trainer, record, loader = fitted(task)
    assert isinstance(next(iter(loader)), transformers.BatchEncoding)
    losses = record.of("train/loss")
    assert losses[-1] < losses[0]
    assert trainer.predict(loader).shape == (60, 2)

    _, stopped, _, _ = fitted(task, steps=5)
    resumed, _, _, _ = fitted(task, resume=stopped.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    own = fw.tasks.build("model_loss", inputs=[*names, "labels"])
    _, _, of_model, _ = fitted(own)
    assert of_model.of("train/loss") == pytest.approx(losses, rel=1e-5)
    whole = trainer.predict(loader, task=fw.tasks.build("classification", inputs=names))
    assert isinstance(whole, transformers.modeling_outputs.SequenceClassifierOutput)
    assert whole.logits.shape == (60, 2)


LENGTHS = [(1, 20), (7, 2), (5, 11)]


@pytest.mark.filterwarnings("ignore")  # of torch about its own code
def test_an_exported_bert_takes_texts_of_any_number_and_length(command, forget_plugins, alone):
    Path("bert_mails.py").write_text(PLUGIN, encoding="utf-8")
    settings = shlex.join([*SETTINGS, *TASK])
    train = f"train --plugins bert_mails.py {settings} trainer.max_epochs=2 run.name=bert"
    assert command(train)[0] == 0
    check_exports(command, "runs/default/bert", alone, LENGTHS)


def check_exports(command, run, alone, lengths):
    """Export a run in all formats; return the reports, and the measurements without framework.

    Args:
        command: the fixture.
        run: the folder of a run with data=bert_mails.
        alone: an empty folder.
        lengths: numbers and lengths of texts for which the files must give the outputs of the run.
    """
    Path("mails.txt").write_text("free cash now\nthe agenda of the meeting\nxyzzy\n")
    reports = {}
    for to in ("safetensors", "torch_export", "onnx"):
        line = f"export {run} --to {to} --output {to} --json --plugins bert_mails.py"
        status, out, err = command(line)
        assert status == 0, err
        reports[to] = json.loads(out)
        about = json.loads(Path(to, "metadata.json").read_text())
        longest = lengths[0][1]
        for name in ("input_ids", "attention_mask"):
            assert about["inputs"][name]["shape"] == ["batch", f"2 to {longest}"]
        save_texts(run, Path(to), lengths)
    measured = measure(alone, *map(Path.absolute, map(Path, reports)))
    for _, difference in measured.values():
        assert difference <= 1e-5
    expected = predictions(run)
    for to in reports:
        found = run_alone(alone, Path(to, "example.py").absolute(), Path("mails.txt").absolute())
        assert isinstance(found, dict), found
        assert found["class"] == [("ham", "spam")[row.argmax()] for row in expected]
        torch.testing.assert_close(torch.tensor(found["probabilities"]), expected)
    return reports, measured


def save_texts(run, folder, lengths):
    """Write random token ids, and what the run gives for them."""
    trained = open_run(run)
    for number, (texts, length) in enumerate(lengths):
        ids = torch.randint(4, trained.model.config.vocab_size, (texts, length))
        mask = torch.ones_like(ids)
        mask[0, (length + 1) // 2 :] = 0
        raw = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            logits = trained.model.eval()(**raw).logits
        probabilities = logits.softmax(1)
        probability, index = probabilities.max(1)
        outputs = {"class_index": index, "probability": probability, "probabilities": probabilities}
        save_case(folder, raw, outputs, f"-{number}")


def predictions(run):
    """Return the probabilities of the classes of mails.txt, by the tokenizer of transformers."""
    trained = open_run(run)
    backend = tokenizers.Tokenizer.from_str(trained.facts["data"]["tokenizer"])
    backend.no_padding()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    texts = Path("mails.txt").read_text().splitlines()
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        outputs = []
        for text in texts:
            encoding = tokenizer([text], return_tensors="pt")
            outputs.append(trained.model.eval()(**{name: encoding[name] for name in names}).logits)
    return torch.cat(outputs).softmax(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch about its own code
def test_bert_on_the_mails_of_spam(command, forget_plugins, alone, capsys):
    require_data("spam")
    Path("bert_mails.py").write_text(PLUGIN, encoding="utf-8")
    real = ["data.count=0", "data.length=128", "data.vocabulary=8000", "model.vocabulary=8000"]
    real += ["model.width=64", "model.depth=2", "optimizer.lr=0.001", "trainer.max_epochs=3"]
    settings = shlex.join([*SETTINGS, *TASK, *real])
    status, _, err = command(f"train --plugins bert_mails.py {settings} run.name=spam")
    assert status == 0, err
    lengths = [(1, 128), (7, 2), (32, 77)]
    reports, measured = check_exports(command, "runs/default/spam", alone, lengths)
    with capsys.disabled():
        for to, report in reports.items():
            print(f"\n{to}: {report}; alone {measured[to]}")
