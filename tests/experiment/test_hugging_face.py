"""Models and tokenizers of Hugging Face, with random weights and without the internet."""

import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import framework as fw
from fits import Record
from framework import Trainer
from framework.experiment.experiment import Experiment
from framework.runs import checkpoint
from runs import Stop

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PLUGIN = '''
import random

import torch
from tokenizers import Tokenizer, models as tokens, pre_tokenizers, trainers
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


def train_tokenizer(texts):
    tokenizer = Tokenizer(tokens.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
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
    """Mails with the classes ham and spam."""

    in_shape = (16,)
    out_shape = (2,)

    def __init__(self, count: int = 80):
        texts, labels = mails(count)
        encode = train_tokenizer(texts)
        settings = {"padding": "max_length", "max_length": 16, "truncation": True}
        cut = count * 3 // 4
        self.train = Mails(encode(texts[:cut], return_tensors="pt", **settings), labels[:cut])
        self.val = Mails(encode(texts[cut:], return_tensors="pt", **settings), labels[cut:])


@fw.models.register("bert")
class Bert(BertForSequenceClassification):
    """A small BERT."""

    def __init__(self, in_shape: fw.Shape, out_shape: fw.Shape, width: int = 16):
        super().__init__(BertConfig(
            vocab_size=40, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=in_shape[0],
            num_labels=out_shape[0],
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
        model = parts["Bert"]((16,), (2,))
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
