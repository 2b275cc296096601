"""Each function that uses private names of Hydra works, and restores the state of Hydra."""

import copy
import pickle

import hydra
import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.composition import hydra_internals
from framework.composition.compose import CommandLine, run_composed
from framework.composition.hydra_internals import (
    LazyStore,
    compose_config,
    compose_job,
    current_config,
    failure_of,
    launcher_in_use,
    make_launcher,
    opened_hydra,
    parse_override,
    parse_overrides,
    print_config,
    print_info,
    quoted_text,
    replaced_file_source,
    result_of,
    set_up_sweeper,
    unresolved_reference,
)

CONFIG = """\
defaults:
  - size: small
  - _self_
layers: [1, 2]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "size").mkdir()
    (tmp_path / "size/small.yaml").write_text("width: 8\n")
    (tmp_path / "size/large.yaml").write_text("width: 80\n")
    return tmp_path


@pytest.fixture
def opened(folder):
    with opened_hydra([folder]) as opened:
        yield opened


def test_a_composed_config_contains_the_node_of_hydra(opened):
    config = compose_config(opened, ["size=large"], multirun=False)
    assert config.size.width == 80
    assert config.hydra.runtime.choices["size"] == "large"
    swept = compose_config(opened, ["size=small,large"], multirun=True)
    assert list(swept.hydra.overrides.task) == ["size=small,large"]
    job = compose_job(opened.config_loader, swept, ["size=large"], 3)
    assert (job.size.width, job.hydra.job.num) == (80, 3)


def test_the_last_folder_is_searched_first(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "size").mkdir()
    (other / "size/small.yaml").write_text("width: 1\n")
    with opened_hydra([folder, other]) as opened:
        assert compose_config(opened, [], multirun=False).size.width == 1


def test_references_to_hydra_are_those_of_the_current_config(opened):
    before = HydraConfig.instance().cfg
    config = compose_config(opened, ["+number=${hydra:job.num}"], multirun=False)
    config.hydra.job.num = 5
    with current_config(config):
        assert config.number == 5
    assert HydraConfig.instance().cfg is before


def test_the_composed_config_is_printed(opened, capsys):
    print_config(opened, ["size=large"], "job", resolve=False)
    assert "width: 80" in capsys.readouterr().out
    print_info(opened, [], "defaults")
    assert "size/small" in capsys.readouterr().out


def test_config_files_are_read_through_another_class_until_the_context_ends(folder):
    read = []

    class FileConfigSource(hydra_internals.FileConfigSource):
        def load_config(self, config_path):
            read.append(config_path)
            return super().load_config(config_path)

    types = SourcesRegistry.instance().types
    before = dict(types)
    with replaced_file_source(FileConfigSource), opened_hydra([folder]) as opened:
        compose_config(opened, [], multirun=False)
    assert {"config", "size/small"} <= set(read)
    with pytest.raises(ZeroDivisionError), replaced_file_source(FileConfigSource):
        raise ZeroDivisionError
    assert types == before


def remade():
    return "made again"


def test_options_are_made_when_they_are_chosen_and_removed_afterwards(folder):
    made = []
    before = ConfigStore.instance()
    names = set(before.repo)
    store = LazyStore.extended(remade)
    store.add("huge", "size", "size", lambda: made.append("huge") or {"width": 800})
    store.add("never", "size", "size", lambda: made.append("never"))
    with store.in_use(), opened_hydra([folder]) as opened:
        assert ConfigStore.instance() is store
        assert compose_config(opened, ["size=huge"], multirun=False).size.width == 800
    assert set(made) == {"huge"}
    assert ConfigStore.instance() is before
    assert set(before.repo) == names
    assert copy.deepcopy(store) is store
    assert pickle.loads(pickle.dumps(store)) == "made again"
    assert copy.deepcopy(before) is not before, "the class does not change"


class AnyLauncher(Launcher):
    def setup(self, *, hydra_context, task_function, config):
        self.task = task_function

    def launch(self, job_overrides, initial_job_idx):
        return []


class AnySweeper(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.context = hydra_context
        self.task = task_function

    def sweep(self, arguments):
        pass


def test_sweepers_get_our_launcher_until_the_context_ends(opened):
    config = compose_config(opened, ["size=small,large"], multirun=True)
    ours = AnyLauncher()
    with launcher_in_use(ours):
        assert make_launcher(None, config, print) is ours
        assert ours.task is print
        sweeper = set_up_sweeper(None, opened, config, len)
        assert sweeper.launcher is ours, "also Hydra's own sweeper"
        assert ours.task is len
    assert type(make_launcher(None, config, print)).__name__ == "BasicLauncher"


def test_our_sweeper_is_set_up(opened):
    config = compose_config(opened, ["size=small,large"], multirun=True)
    ours = AnySweeper()
    assert set_up_sweeper(ours, opened, config, print) is ours
    assert (ours.task, ours.context.config_loader) == (print, opened.config_loader)


def test_the_result_of_a_job_is_returned_or_its_error_raised(capsys):
    done = JobReturn(status=JobStatus.COMPLETED)
    done.return_value = 3
    assert result_of(done) == 3
    failed = JobReturn(status=JobStatus.FAILED)
    failed._return_value = ZeroDivisionError("no")
    with pytest.raises(ZeroDivisionError):
        result_of(failed)
    assert capsys.readouterr() == ("", "")


def test_overrides_are_parsed():
    assert parse_override("a.b=[1,x]").value() == [1, "x"]
    assert [each.is_sweep_override() for each in parse_overrides(["a=1", "a=1,2"])] == [False, True]
    assert parse_override(f"a={quoted_text(chr(39) + ', 1')}").value() == "', 1"
    with pytest.raises(HydraException):
        parse_override("a=[")


@pytest.mark.parametrize(
    ("override", "kind", "path", "in_file"),
    [
        ("size=medium", "option", "size/medium", True),
        ("hydra.job.nam=a", "override", "hydra.job.nam", True),
        ("colour@x=red", "other", "", False),
        ("~size.height", "delete", "size.height", False),
        ("++layers.7=1", "item", "layers.7", False),
    ],
)
def test_the_facts_of_an_error_are_found(opened, override, kind, path, in_file):
    with pytest.raises((HydraException, OmegaConfBaseException)) as raised:
        compose_config(opened, [override], multirun=False)
    failure = failure_of(raised.value)
    assert (failure.kind, failure.path, failure.in_file) == (kind, path, in_file)
    if kind == "option":
        assert list(failure.options) == ["large", "small"]
    if kind == "other":
        assert "colour@x=red" in failure.text


def test_an_override_of_a_missing_group_in_a_file_is_found(folder):
    defaults = "defaults:\n  - size: small\n  - override colour: red\n  - _self_\n"
    (folder / "config.yaml").write_text(defaults)
    with opened_hydra([folder]) as opened, pytest.raises(HydraException) as raised:
        compose_config(opened, [], multirun=False)
    failure = failure_of(raised.value)
    assert (failure.kind, failure.path, failure.in_file) == ("override", "colour", True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("${nope.x}", "refers to nope.x, which does not exist"),
        ("${value}", "refers to itself"),
        ("${no.resolver:1}", "Unsupported interpolation type no.resolver"),
    ],
)
def test_an_unresolved_reference_has_a_reason(value, reason):
    with pytest.raises(OmegaConfBaseException) as raised:
        OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)
    assert unresolved_reference(raised.value) == reason


def test_another_hydra_application_of_the_process_is_not_affected(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        options = copy.deepcopy(ConfigStore.instance().repo).keys()
        plugins = dict(Plugins.instance().class_name_to_class)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        jobs = []
        run_composed(CommandLine(["optimizer=sgd"]), jobs.append)
        assert jobs[0].spec.tree["optimizer"]["name"] == "sgd"
        assert GlobalHydra.instance().hydra is before
        assert ConfigStore.instance().repo.keys() == options
        assert Plugins.instance().class_name_to_class == plugins
        assert hydra.compose("config", ["size=large"]).size.width == 80
        assert hydra.compose("config", ["+optimizer=sgd"]).optimizer == "sgd", (
            "not a group of the framework"
        )
