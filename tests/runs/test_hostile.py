"""A malicious run folder or checkpoint executes no code, and is refused in one line."""

import json
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import time
import zipfile
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml

from framework.composition.spec import read_spec
from framework.errors import FrameworkError
from framework.experiment.build import build_model
from framework.experiment.experiment import train
from framework.experiment.model_limits import model_limits
from framework.experiment.result import last_values
from framework.experiment.resumption.find_run import find_run, run_to_resume
from framework.experiment.resumption.resume_overrides import apply_overrides
from framework.experiment.trained.load import open_run, read_spec_of
from framework.registry.registry import Registry
from framework.runs import checkpoint
from framework.runs.checkpoint import (
    MANIFEST,
    MODEL,
    TRAINING,
    checks,
    load,
    newest,
    own_sha256,
    remove,
    save,
)
from framework.runs.folder import read_config, resolve_run

STATE = {"weight": torch.ones(2, 3)}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return (os.system, (f"touch {self.proof}",))


@pytest.fixture
def proof(tmp_path):
    """Return the path of a file that must never exist."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the payload was executed"


@pytest.fixture
def written(tmp_path):
    return save(tmp_path / "checkpoints", STATE, {"counters": {"step": 1}}, 1)


def test_the_payload_works(tmp_path):
    """Control: without it the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def sign(written: Path, **changes) -> None:
    """Update the manifest to the present files, as an attacker can do."""
    manifest = json.loads((written / MANIFEST).read_text()) | changes
    for name in (MODEL, TRAINING) if "files" not in changes else ():
        content = (written / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    del manifest["sha256"]
    (written / MANIFEST).write_text(json.dumps(manifest | {"sha256": own_sha256(manifest)}))


def refused(call, *arguments, match=None):
    """Check that a call raises a user error of one line, and return the error."""
    with pytest.raises(FrameworkError, match=match) as error:
        call(*arguments)
    assert str(error.value).strip()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return error.value


def error_of(call, *arguments, **more):
    """Return the message of the user error of a call; None without an error."""
    try:
        call(*arguments, **more)
    except FrameworkError as error:
        return str(error)
    return None


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


def beside_valid_records(payload, file):
    """Replace data.pkl in a torch file by the payload."""
    torch.save({"x": torch.ones(3)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, pickle.dumps(payload) if name.endswith("data.pkl") else content)


FORMS = [in_plain_pickle, in_a_torch_file, in_an_old_torch_file, as_a_module, beside_valid_records]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [MODEL, TRAINING])
@pytest.mark.parametrize("signed", [True, False])
def test_code_in_a_checkpoint_is_not_executed(written, proof, form, name, signed):
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


@pytest.mark.parametrize(
    "name", ["../precious", "../../precious", "sub/precious", "/etc/hostname", "..", "."]
)
def test_a_manifest_with_files_outside_its_folder_is_refused(written, tmp_path, name):
    for place in (tmp_path, written.parent):
        (place / "precious").write_text("mine")
    files = json.loads((written / MANIFEST).read_text())["files"]
    sign(written, files=files | {name: {"bytes": 4, "sha256": sha256(b"mine").hexdigest()}})
    for use in (load, remove, checkpoint.verify):
        refused(use, written, match="lists .*not a file of a checkpoint")
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
def test_a_manifest_of_another_form_is_refused_in_one_line(written, content):
    (written / MANIFEST).write_text(content, encoding="latin-1")
    refused(load, written)
    assert newest(written.parent)[0] is None


def test_a_signed_manifest_without_its_parts_is_refused(written):
    for changes in ({"files": {}}, {"nan": None}, {"files": {MODEL: {}, TRAINING: {}}}):
        sign(written, **changes)
        refused(load, written)
        save(written.parent, STATE, {}, 1)


def test_impossible_file_sizes_are_refused(written):
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
def test_a_model_file_with_a_false_header_is_refused(written, header):
    (written / MODEL).write_bytes(struct.pack("<Q", len(header)) + header)
    sign(written)
    refused(load, written, match="cannot be read")
    (written / MODEL).write_bytes(struct.pack("<Q", 2**63) + header)
    sign(written)
    refused(load, written, match="cannot be read")


def test_a_training_file_without_a_state_is_refused(written):
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


def test_a_device_or_a_pipe_is_refused_without_waiting(written):
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


def test_the_run_of_the_tests_below_is_valid(run):
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
def test_tags_in_a_config_create_no_objects(run, proof, text):
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
def test_deep_nesting_in_a_config_is_refused_in_one_line(run, content):
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
def test_code_in_the_checkpoint_of_a_run_is_not_executed(run, proof, form):
    written = run / "checkpoints" / "step-00000001"
    form(Payload(proof), written / TRAINING)
    sign(written)
    open_run(run)  # which does not look at it
    refused(load, written)
    form(Payload(proof), written / MODEL)
    sign(written)
    refused(open_run, run)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "null", '{"in_shape": "../..", "out_shape": [10]}', bomb(100_000)],
    ids=range(5),
)
def test_invalid_facts_are_refused(run, content):
    (run / "facts.json").write_text(content)
    refused(open_run, run)


# what takes time or memory


@contextmanager
def within(seconds=2.0, megabytes=500):
    """Check that this context takes at most some CPU time, time and memory."""
    times = time.process_time(), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - times[0] < seconds
    assert time.monotonic() - times[1] < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


SIZES = {
    "width": {"width": 10**9},
    "wider than memory": {"width": 10**15},
    "depth": {"depth": 10**9},
    "both": {"width": 10**6, "depth": 10**6},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_a_model_much_larger_than_its_checkpoint_takes_no_memory(run, changes):
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": MODEL_OF | changes}))
    with within():
        refused(open_run, run, match=r"the config needs|model=mlp|expected")


class Seeded(torch.nn.Linear):
    """A user's model with a large setting that is not a size."""

    def __init__(self, in_shape, out_shape, seed: int = 0):
        super().__init__(in_shape[0], out_shape[0])
        self.register_buffer("mask", torch.ones(10_000, 10_000, dtype=torch.bool), persistent=False)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**40])
def test_a_setting_of_a_users_model_may_be_a_seed(seed, run, monkeypatch):
    monkeypatch.setattr(Registry.every["model"], "_entries", dict(Registry.every["model"]._entries))
    Registry.every["model"].register("seeded")(Seeded)
    spec = read_spec(CONFIG | {"model": {"name": "seeded", "seed": seed}})
    shapes = {"weight": (3, 4), "bias": (3,)}
    if seed > 2**32:
        with (
            pytest.raises(FrameworkError, match="model=seeded: a setting is"),
            model_limits(spec, shapes),
        ):
            pass
        return
    with model_limits(spec, shapes):
        assert isinstance(build_model(spec, (4,), (3,)), Seeded)


SHAPES = [
    [10**12],
    [10**30],
    [1] * 10**6,
    [-1],
    [2.5],
    ["64"],
    [[64]],
    {"64": 1},
    None,
    "64",
    [True],
    [2**40] * 40,
]


@pytest.mark.parametrize("name", ["in_shape", "out_shape"])
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_impossible_shapes_are_refused(run, name, shape):
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(facts | {name: shape}))
    with within():
        refused(open_run, run)


OTHER_FACTS = {
    "classes": ["x" * 10**5, 7, {"a": 1}, [["a"]], ["a"] * 2_000_000],
    "columns": [[-1], ["a"], 7, [10**30]],
    "scale": [[1], [1, "a"], [1, 2, 3], "ab", [[1], [{}], False]],
    "data": [[], 7, None, "x"],
}


OTHER_CASES = []
for name, values in OTHER_FACTS.items():
    OTHER_CASES += [(name, index) for index in range(len(values))]


@pytest.mark.parametrize(("name", "index"), OTHER_CASES)
def test_facts_of_other_types_are_refused(run, name, index):
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(facts | {name: OTHER_FACTS[name][index]}))
    with within(seconds=4):
        refused(open_run, run, match=r"facts\.json")


def sparse(written, name, size):
    """Make a file in the manifest as large as a disk, as a hole."""
    with (written / name).open("r+b") as file:
        file.truncate(size)
    files = json.loads((written / MANIFEST).read_text())["files"]
    sign(written, files=files | {name: {"bytes": size, "sha256": ""}})


@pytest.mark.parametrize("name", [MODEL, TRAINING])
def test_a_checkpoint_as_large_as_a_disk_is_not_read(written, name):
    sparse(written, name, 2**42)
    with within():
        refused(load, written, match="sparse file: 4,398,046,511,104 bytes")
        found, [why] = newest(written.parent)
    assert found is None
    assert "sparse file" in why


def test_holes_in_a_file_of_data_are_read(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**31)
        file.seek(2**30)
        file.write(b"x" * 2**27)
    with (tmp_path / "file").open("rb") as file:
        checkpoint.check_size(file, 2**31, tmp_path / "file")


def test_a_checkpoint_larger_than_the_free_memory_is_not_loaded(written, monkeypatch):
    monkeypatch.setattr(checks, "available_bytes", lambda: 1000)
    refused(load, written, match="1,000 bytes of memory are free")
    checkpoint.verify(written)


def compressed(written):
    """Compress a training state of zeros, which is a thousand times larger in memory."""
    torch.save({"x": torch.zeros(2**20)}, written / TRAINING)
    with zipfile.ZipFile(written / TRAINING) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(written / TRAINING, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def allocating(written):
    """A pickle that asks for 10 GB: torch allows it to call bytearray."""
    torch.save({"x": 1}, written / TRAINING)
    replace_pickle(written, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R.")


def replace_pickle(written, content):
    with zipfile.ZipFile(written / TRAINING) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(written / TRAINING, "w") as archive:
        for name, before in records.items():
            archive.writestr(name, content if name.endswith("data.pkl") else before)


def expanded_tensor(written):
    torch.save({"x": torch.ones(1).expand(10**9)}, written / TRAINING)


def shared_lists(written):
    value = ["x"] * 10
    for _ in range(10):
        value = [value] * 10
    torch.save({"x": value}, written / TRAINING)


def cycle(written):
    value = {}
    value["self"] = value
    torch.save(value, written / TRAINING)


BOMBS = [compressed, allocating, expanded_tensor, shared_lists, cycle]


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_training_state_that_is_larger_in_memory_is_refused(written, make):
    make(written)
    sign(written)
    with within(seconds=4):
        refused(load, written, match="cannot be read")


# links, and what is no file, in a run that is resumed


def spec_in(root, name=None):
    more = {
        "callbacks": {"checkpoint": {}},
        "loggers": {"json_lines": {}},
        "data": {"name": "blobs", "samples": 100},
    }
    return read_spec(CONFIG | more | {"run": {"root": str(root), "name": name}})


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    train(spec_in(root, "r"), "default", [], say=lambda line: None)
    return root / "default" / "r"


@pytest.fixture
def trained_run(trained_once, tmp_path):
    return Path(shutil.copytree(trained_once, tmp_path / "default" / "r", symlinks=True))


@pytest.fixture
def victim(tmp_path):
    """Return a file outside of the run that must not change."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def resume(run, *overrides):
    spec = read_spec_of(
        run, apply_overrides(read_config(run_to_resume(run)), overrides or ["trainer.max_epochs=2"])
    )
    spec.resume = str(run)
    return train(spec, "default", [], say=lambda line: None)


ABSURD = [
    ("eval {}", "loader", "workers", r"loader\.workers=1000000: .*\[0, 1024\]"),
    ("resume {}", "loader", "workers", r"loader\.workers=1000000: .*\[0, 1024\]"),
    (
        "predict {} --input new.csv --output y.csv",
        "loader",
        "workers",
        r"loader\.workers=1000000: .*\[0, 1024\]",
    ),
    ("eval {}", "data", "samples", "blobs with samples=1000000000000, .*needs about"),
    ("resume {}", "data", "samples", "blobs with samples=1000000000000, .*needs about"),
]


@pytest.mark.parametrize(
    ("verb", "section", "name", "message"),
    ABSURD,
    ids=[f"{verb.split()[0]}-{name}" for verb, _, name, _ in ABSURD],
)
def test_an_absurd_setting_of_a_run_is_refused(
    command, trained_run, monkeypatch, verb, section, name, message
):
    Path("new.csv").write_text("a,b\n1,2\n")
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    config["trainer"]["max_epochs"] = 2
    (trained_run / "status.json").unlink()  # which says that it is done
    config.setdefault(section, {})[name] = {"workers": 10**6, "samples": 10**12}[name]
    (trained_run / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    with within():
        status, out, err = command(verb.format(trained_run))
    assert status == 2, out
    assert re.search(message, err), err
    assert err.count("\n") == 1


STEP = "checkpoints/step-00000003"
OURS = [".lock", "config.yaml", "facts.json"]
OURS += [f"{STEP}/{name}" for name in (MODEL, TRAINING, MANIFEST)]
REPLACED = ["status.json", "provenance.json", "overrides.yaml"]
TEMPORARY = ["status.tmp", "config.yaml.tmp", "facts.json.tmp", "metrics.jsonl.new"]


def test_a_copied_run_is_resumed(trained_run):
    """Control: without it the tests below would prove nothing."""
    assert (trained_run / STEP / MODEL).is_file()
    before = (trained_run / "config.yaml").read_text()
    assert resume(trained_run).steps > 3
    assert (trained_run / "config.yaml").read_text() != before
    assert open_run(trained_run).evaluate()


def put(make, path, victim):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path, victim)


def link(path, victim):
    path.symlink_to(victim)


def hard_link(path, victim):
    os.link(victim, path)


def fifo(path, victim):
    os.mkfifo(path)


def device(path, victim):
    path.symlink_to("/dev/zero")


def folder(path, victim):
    path.mkdir()


FORMS_OF_FILES = [link, hard_link, fifo, device, folder]


@pytest.mark.parametrize("make", FORMS_OF_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", OURS)
def test_a_file_outside_of_the_run_is_neither_read_nor_written(trained_run, victim, name, make):
    put(make, trained_run / name, victim)
    with within():
        if name.startswith("checkpoints"):
            refused(open_run, trained_run)
            messages = []
            spec = read_spec_of(
                trained_run, apply_overrides(read_config(trained_run), ["trainer.max_epochs=2"])
            )
            spec.resume = str(trained_run)
            message = error_of(train, spec, "default", [], say=messages.append)
            assert (
                any("skipped" in line for line in messages)
                if message is None
                else "\n" not in message
            )
        else:
            refused(resume, trained_run, match="link|regular file|directory")


@pytest.mark.parametrize("make", FORMS_OF_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", REPLACED + TEMPORARY)
def test_a_file_that_is_replaced_is_not_followed(trained_run, victim, name, make):
    if name in TEMPORARY and make is folder:
        return  # a folder is no litter, and stays
    put(make, trained_run / name, victim)
    with within():
        message = error_of(resume, trained_run)
    assert message is None or (make is folder and "\n" not in message)
    if name in TEMPORARY:
        assert not os.path.lexists(trained_run / name)


@pytest.mark.parametrize("name", ["checkpoints", STEP, "checkpoints/best"])
@pytest.mark.parametrize("target", ["outside", "../../outside", "/etc", "step-00000003/.."])
def test_a_folder_of_a_run_that_is_a_link_is_refused(trained_run, tmp_path, name, target):
    outside = Path(shutil.copytree(trained_run / STEP, tmp_path / "outside"))
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    path = trained_run / name
    put(
        lambda path, victim: path.symlink_to(outside if target == "outside" else target), path, None
    )
    refused(open_run, trained_run, match="symbolic link|not good|no checkpoint")
    with within():
        message = error_of(resume, trained_run)
    assert message is None or "symbolic link" in message
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


@pytest.fixture
def sweep(trained_run):
    """Make a sweep with its `best`, like `SweepFolder.link_best`."""
    folder = trained_run.parent
    (folder / "sweep.json").write_text("{}")
    best = folder / "best"
    best.mkdir()
    for file in trained_run.glob("[!.]*"):
        (best / file.name).symlink_to(Path("..", "r", file.name))
    return folder


def test_the_best_of_a_sweep_is_resolved_to_its_run(sweep):
    assert resolve_run(sweep / "best") == sweep / "r"
    assert (
        resolve_run(sweep / "best" / "checkpoints" / "best") == sweep / "r" / "checkpoints" / "best"
    )
    assert open_run(sweep / "best").run == sweep / "r"
    assert open_run(sweep / "best" / STEP).checkpoint == sweep / "r" / STEP
    assert resume(sweep / "best").folder == sweep / "r"


@pytest.mark.parametrize(
    "text", ["../../outside/config.yaml", "/etc/passwd", "../s/config.yaml", "../r/facts.json"]
)
def test_a_best_that_leads_out_of_its_sweep_is_refused(sweep, tmp_path, text):
    shutil.copytree(sweep / "r", tmp_path / "outside", symlinks=True)
    (sweep / "s").symlink_to(tmp_path / "outside")
    put(lambda path, victim: path.symlink_to(text), sweep / "best" / "config.yaml", None)
    refused(open_run, sweep / "best", match="symbolic link")
    (sweep / "sweep.json").unlink()
    refused(open_run, sweep / "best", match="symbolic link")


# the state of a run


def change_training(run, changes):
    step = run / STEP
    state = torch.load(step / TRAINING, weights_only=True)
    torch.save(changes(state), step / TRAINING)
    sign(step)


STATES = {
    "nothing": lambda state: {},
    "no optimizer": lambda state: state | {"optimizer": 7},
    "no groups": lambda state: state | {"optimizer": {"param_groups": 7}},
    "groups of texts": lambda state: state | {"optimizer": {"param_groups": ["x"]}},
    "state of texts": lambda state: state | {"optimizer": state["optimizer"] | {"state": "x"}},
    "counters": lambda state: state | {"counters": {"step": "x"}},
    "attributes": lambda state: state | {"counters": {"state_dict": 1}},
    "negative": lambda state: state | {"counters": {"step": -1}},
    "callbacks": lambda state: state | {"callbacks": []},
    "random": lambda state: state | {"random": {"python": 1}},
    "measures": lambda state: state | {"measures": [[[]]]},
    "validated": lambda state: {key: value for key, value in state.items() if key != "validated"},
}


@pytest.mark.parametrize("changes", STATES.values(), ids=STATES)
def test_a_training_state_of_another_form_is_refused_in_one_line(trained_run, changes):
    change_training(trained_run, changes)
    refused(resume, trained_run)


@pytest.mark.parametrize("facts", [[], None, {"threads": 10**9}, {"threads": "x"}, {"threads": -1}])
def test_invalid_facts_in_a_manifest_are_ignored(trained_run, facts):
    sign(trained_run / STEP, run=facts)
    assert resume(trained_run).steps > 3


def test_torn_and_undecodable_lines_of_metrics_are_skipped(trained_run):
    for line in (
        '{"step": 40, "ep',
        '\n[1]\n{"step": "x", "val/loss": 1}\n{"step": 2, "val/loss": {}}\n',
        "\udcff",
    ):
        with (trained_run / "metrics.jsonl").open(
            "a", encoding="utf-8", errors="surrogateescape"
        ) as file:
            file.write(line)
        assert last_values(trained_run)[1] == last_values(trained_run)[1]
    resume(trained_run, "trainer.max_epochs=1")


# other runs of the root

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


def test_multiplying_aliases_in_one_run_do_not_stop_other_commands(trained_run):
    with (trained_run / "config.yaml").open("a") as file:
        file.write(ALIASES)
    with within():
        refused(resume, trained_run, match="too large")
        refused(open_run, trained_run, match="too large")


def unfinished(run):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"status": "stopped"}))
    spec = spec_in(run.parent.parent)
    spec.resume = "auto"
    return spec


@pytest.mark.parametrize("older", [False, True], ids=["fingerprint", "older version"])
def test_damaged_runs_in_the_root_are_skipped_with_a_note(trained_run, older, capsys, victim):
    spec = unfinished(trained_run)
    root = trained_run.parent
    if older:
        status = json.loads((trained_run / "status.json").read_text())
        del status["config"]
        (trained_run / "status.json").write_text(json.dumps(status))
    for number, text in enumerate([ALIASES, "", "[" * 10**6, "a: [", "\x00", "- 1", "7"]):
        (root / f"text{number}").mkdir()
        (root / f"text{number}" / "config.yaml").write_text(text)
    for make in FORMS_OF_FILES:
        (root / make.__name__).mkdir()
        make(root / make.__name__ / "config.yaml", victim)
        for name in ("status", "folder"):
            (root / f"{name} {make.__name__}").mkdir()
            shutil.copy(
                trained_run / "config.yaml", root / f"{name} {make.__name__}" / "config.yaml"
            )
        with (root / f"folder {make.__name__}" / "config.yaml").open("a") as file:
            file.write("other: 1\n")
        make(root / f"status {make.__name__}" / "status.json", victim)
        shutil.rmtree(root / f"status {make.__name__}")
    (root / "loop").symlink_to(".")
    (root / "file").write_text("")
    (root / "dangling").symlink_to("nowhere")
    (root / "esc\x1b[31m").mkdir()
    (root / "esc\x1b[31m" / "config.yaml").mkdir()
    with within():
        assert find_run(spec, "default") == trained_run
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("framework: ") and line.isprintable() for line in lines)


@pytest.mark.parametrize("older", [False, True], ids=["fingerprint", "older version"])
def test_many_other_runs_take_little_time(trained_run, older, capsys):
    """10,000 runs take less than 5 s: half of them are done, the others have other configs."""
    spec = unfinished(trained_run)
    root = trained_run.parent
    count = 400
    os.utime(trained_run / "config.yaml", (0, 0))  # it is the last one that is looked at
    os.utime(trained_run / "status.json", (1, 1))
    text = (trained_run / "config.yaml").read_text()
    for number in range(count):
        other = root / f"other{number}"
        other.mkdir()
        (other / "config.yaml").write_text(text.replace("seed: 0", f"seed: {number + 1}"))
        status = {"status": "done" if number % 2 else "stopped"} | (
            {} if older else {"config": f"{number}"}
        )
        (other / "status.json").write_text(json.dumps(status))
    assert text != (root / "other1" / "config.yaml").read_text()
    began = time.process_time()
    assert find_run(spec, "default") == trained_run
    allowed = 5 * count / 10_000
    if older:
        allowed += 1.0  # as configs are read, at most 500 of however many runs
    assert time.process_time() - began < allowed


def test_a_fingerprint_older_than_the_config_is_ignored(trained_run):
    """The process is killed after it wrote the config of a resumed run, and before its status."""
    spec = unfinished(trained_run)
    status = json.loads((trained_run / "status.json").read_text())
    (trained_run / "status.json").write_text(json.dumps(status | {"config": "another"}))
    assert find_run(spec, "default") is None
    later = (trained_run / "status.json").stat().st_mtime + 10
    os.utime(trained_run / "config.yaml", (later, later))
    assert find_run(spec, "default") == trained_run


def test_a_run_with_a_false_fingerprint_is_not_resumed(trained_run):
    spec = unfinished(trained_run)
    text = (trained_run / "config.yaml").read_text()
    (trained_run / "config.yaml").write_text(text.replace("width: 4", "width: 5"))
    os.utime(trained_run / "config.yaml", (0, 0))
    assert find_run(spec, "default") is None
