"""Files made to harm: a run folder or a checkpoint from a stranger executes nothing, and is refused in one line."""

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml

from framework import checkpoint
from framework.checkpoint import MANIFEST, MODEL, TRAINING, load, newest, own_sha256, remove, save
from framework.errors import FrameworkError
from framework.run import read_config
from framework.spec import read_spec
from framework.trained import open_run

STATE = {"weight": torch.ones(2, 3)}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return (os.system, (f"touch {self.proof}",))


@pytest.fixture
def proof(tmp_path):
    """A file that must never be made."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the payload was executed"


@pytest.fixture
def written(tmp_path):
    return save(tmp_path / "checkpoints", STATE, {"counters": {"step": 1}}, 1)


def test_the_payload_works(tmp_path):
    """Or nothing below would show anything."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def sign(written: Path, **changes) -> None:
    """Make the manifest fit whatever the files are now: who makes a file can make its checksum."""
    manifest = json.loads((written / MANIFEST).read_text()) | changes
    for name in (MODEL, TRAINING):
        content = (written / name).read_bytes()
        if "files" not in changes:
            manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    del manifest["sha256"]
    (written / MANIFEST).write_text(json.dumps(manifest | {"sha256": own_sha256(manifest)}))


def refused(call, *arguments, match=None):
    """The call ends in an error for people, of one line."""
    with pytest.raises(FrameworkError, match=match) as error:
        call(*arguments)
    assert str(error.value).strip()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return error.value


# checkpoints


def in_plain_pickle(payload, file):
    file.write_bytes(pickle.dumps(payload))


def in_a_torch_file(payload, file):
    torch.save({"counters": {"step": payload}}, file)


def in_an_old_torch_file(payload, file):
    torch.save([payload], file, _use_new_zipfile_serialization=False)


def as_a_module(payload, file):
    model = torch.nn.Linear(1, 1)
    model.payload = payload
    torch.save(model, file)


def beside_honest_records(payload, file):
    """A torch file whose data.pkl is exchanged for another pickle."""
    torch.save({"x": torch.ones(3)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, pickle.dumps(payload) if name.endswith("data.pkl") else content)


FORMS = [in_plain_pickle, in_a_torch_file, in_an_old_torch_file, as_a_module, beside_honest_records]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [MODEL, TRAINING])
@pytest.mark.parametrize("signed", [True, False])
def test_code_in_a_checkpoint_is_not_run(written, proof, form, name, signed):
    form(Payload(proof), written / name)
    if signed:
        sign(written)
    refused(load, written, match="cannot be read" if signed else "damaged|instead of")
    if not signed:
        assert newest(written.parent)[0] is None


def test_globals_of_a_pickle_are_not_even_imported(written, tmp_path, monkeypatch):
    (tmp_path / "innocent_looking.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (written / TRAINING).write_bytes(b"\x80\x02cinnocent_looking\nx\n.")
    sign(written)
    refused(load, written, match="cannot be read")
    assert "innocent_looking" not in sys.modules


@pytest.mark.parametrize("name", ["../precious", "../../precious", "sub/precious", "/etc/hostname", "..", "."])
def test_a_manifest_leads_nowhere_else(written, tmp_path, name):
    for place in (tmp_path, written.parent):
        (place / "precious").write_text("mine")
    files = json.loads((written / MANIFEST).read_text())["files"]
    sign(written, files=files | {name: {"bytes": 4, "sha256": sha256(b"mine").hexdigest()}})
    for use in (load, remove, checkpoint.verify):
        refused(use, written, match="which is no file of a checkpoint")
    assert (tmp_path / "precious").exists()
    assert (written.parent / "precious").exists()


def bomb(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "content",
    [
        bomb(100_000),
        '{"schema": 1, "files": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
        "[]",
        "null",
        '{"schema": "1"}',
        '{"schema": 1, "files": [], "sha256": ""}',
        '{"schema": 1, "files": {"model.safetensors": 7}, "sha256": ""}',
        '{"schema": 1e999}',
        '{"schema": -1, "files": {}, "nan": [], "sha256": "x"}',
        "1" * 10_000,
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        "",
    ],
    ids=range(12),
)
def test_a_manifest_of_any_shape_is_refused_in_a_line(written, content):
    (written / MANIFEST).write_text(content, encoding="latin-1")
    refused(load, written)
    assert newest(written.parent)[0] is None


def test_a_signed_manifest_without_its_parts_is_refused(written):
    for changes in ({"files": {}}, {"nan": None}, {"files": {MODEL: {}, TRAINING: {}}}):
        sign(written, **changes)
        refused(load, written)
        save(written.parent, STATE, {}, 1)


def test_sizes_that_no_disk_has_are_refused(written):
    files = json.loads((written / MANIFEST).read_text())["files"]
    sign(written, files=files | {MODEL: {"bytes": 2**70, "sha256": ""}})
    refused(load, written, match=f"instead of {2**70}")


def test_a_manifest_as_large_as_a_disk_is_not_read(written):
    with (written / MANIFEST).open("r+b") as file:
        file.truncate(2**36)  # a hole: it takes no room
    refused(load, written, match="68,719,476,736 bytes")


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b" " * 10,
        json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode(),
        json.dumps({"__metadata__": {"tied": '{"a": "nowhere"}'}}).encode(),
        json.dumps({"__metadata__": {"tied": "[1, 2]"}}).encode(),
        json.dumps({"__metadata__": {"tied": bomb(100_000)}}).encode(),
        bomb(10_000).encode(),
    ],
    ids=range(7),
)
def test_a_model_file_that_lies_about_itself(written, header):
    (written / MODEL).write_bytes(struct.pack("<Q", len(header)) + header)
    sign(written)
    refused(load, written, match="cannot be read")
    (written / MODEL).write_bytes(struct.pack("<Q", 2**63) + header)
    sign(written)
    refused(load, written, match="cannot be read")


def test_a_training_file_that_holds_no_state(written):
    for content in ([1, 2], 7, "text", torch.ones(3)):
        torch.save(content, written / TRAINING)
        sign(written)
        refused(load, written, match="cannot be read")


def test_a_checkpoint_that_is_a_link_is_neither_replaced_nor_removed(written, tmp_path):
    elsewhere = shutil.move(written, tmp_path / "elsewhere")
    written.symlink_to(elsewhere)
    refused(remove, written, match="symbolic link")
    refused(save, written.parent, STATE, {}, 1, match="symbolic link")
    assert sorted(os.listdir(elsewhere)) == sorted(checkpoint.FILES)


def test_a_file_that_is_a_device_or_a_pipe_is_not_waited_for(written):
    for name in (MODEL, MANIFEST):
        (written / name).unlink()
        os.mkfifo(written / name)
        refused(load, written)
        (written / name).unlink()
        (written / name).symlink_to("/dev/zero")
        refused(load, written)
        (written / name).unlink()


# runs

MODEL_OF = {"name": "mlp", "width": 4, "depth": 1}
CONFIG = {
    "data": {"name": "digits"},
    "model": MODEL_OF,
    "task": {"name": "classification"},
    "optimizer": {"name": "sgd"},
}
CONFIG |= {"trainer": {"max_epochs": 1}}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    facts = {"in_shape": [64], "out_shape": [10], "classes": [], "data": {}}
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    spec = read_spec(CONFIG)
    model = spec.parts["model"]((64,), (10,))
    save(folder / "checkpoints", model.state_dict(), {}, 1)
    return folder


def test_the_run_below_is_sound_but_for_what_is_done_to_it(run):
    assert open_run(run).checkpoint.name == "step-00000001"


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {proof}']",
        "model: !!python/object/apply:os.system ['touch {proof}']",
        "model: !!python/object/new:os.system ['touch {proof}']",
        "model: !!python/name:os.system ''",
        "model: !!python/module:os ''",
        "- 1",
        "model: [",
    ],
)
def test_tags_in_a_config_make_no_objects(run, proof, text):
    (run / "config.yaml").write_text(text.replace("{proof}", str(proof)))
    refused(open_run, run)


@pytest.mark.parametrize(
    "changes",
    [
        {"_target_": "os.system"},
        {"model": {"_target_": "os.system", "command": "touch {proof}"}},
        {"model": MODEL_OF | {"_target_": "os.system"}},
        {"model": MODEL_OF | {"activation": {"_target_": "os.system"}}},
        {"model": MODEL_OF | {"activation": "os.system"}},
        {"callbacks": [{"_target_": "os.system", "_args_": ["touch {proof}"]}]},
        {"model": "../../../evil"},
        {"model": {"name": "${oc.env:HOME}"}},
        {"model": {"name": ["mlp"]}},
        {"loader": {"workers": "__import__('os').system('touch {proof}')"}},
        {"trainer": {"max_epochs": "${eval:1}"}},
        {"run": {"name": "../../escape"}, "seed": "!!python/name:os.system"},
    ],
)
def test_a_config_reaches_registered_names_only(run, proof, changes):
    content = yaml.safe_dump(CONFIG | changes).replace("{proof}", str(proof))
    (run / "config.yaml").write_text(content)
    with pytest.raises(FrameworkError):
        open_run(run)


def test_plugins_named_by_a_run_are_not_loaded(run, proof, tmp_path):
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(proof)!r}, 'w')")
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"plugins": [str(evil), "evil"]}))
    (run / "provenance.json").write_text(json.dumps({"plugins": [str(evil)]}))
    open_run(run)


@pytest.mark.parametrize("content", [bomb(2_000), "{a: " * 2_000 + "}" * 2_000])
def test_deep_nesting_in_a_config_is_refused_in_a_line(run, content):
    (run / "config.yaml").write_text(content)
    refused(read_config, run)


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory(run):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 5)]
    (run / "config.yaml").write_text("\n".join([*lines, "b: &b [*b]"]))
    with pytest.raises(FrameworkError) as error:
        open_run(run)
    assert len(str(error.value)) < 5_000


@pytest.mark.parametrize("form", FORMS)
def test_code_in_the_checkpoint_of_a_run_is_not_run(run, proof, form):
    written = run / "checkpoints" / "step-00000001"
    form(Payload(proof), written / TRAINING)
    sign(written)
    open_run(run)  # which does not look at it
    refused(load, written)
    form(Payload(proof), written / MODEL)
    sign(written)
    refused(open_run, run)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"in_shape": "../..", "out_shape": [10]}', bomb(100_000)], ids=range(5)
)
def test_facts_that_are_none_are_refused(run, content):
    (run / "facts.json").write_text(content)
    refused(open_run, run)
