import gc
import logging
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import framework as fw
import framework_plugins
from framework.cli.main import main
from framework.registry.discovery import files_in
from framework.registry.registry import Registry
from framework.runtime.torch_internals.compiler import CompiledFunction
from framework.training.acceleration import compiled_step
from shipped import shipped
from suites import place_of, suite_of

torch.set_num_threads(1)  # some tests fork, and a process with OpenMP threads must not fork


def leave_out_user_plugins():
    """Replace each plugin that a user added to this checkout by an empty module; return the files.

    A plugin is a user's own if git does not track it.
    """
    folder = Path(framework_plugins.__path__[0])
    own = set(shipped(folder, "**/*.py"))
    left_out = []
    for file in files_in(folder):
        if file not in own:
            module = file.parent if file.name == "__init__.py" else file.with_suffix("")
            name = ".".join(["framework_plugins", *module.relative_to(folder).parts])
            sys.modules[name] = ModuleType(name)
            left_out.append(file)
    return left_out


def stop_ignoring_signals():
    """Let the tests, and their child processes, end by SIGINT and SIGHUP as at a terminal.

    A shell starts a command in the background with SIGINT ignored, nohup one with SIGHUP ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


USER_PLUGINS = leave_out_user_plugins()
stop_ignoring_signals()
fw.discover()


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist; it would sort by number of tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place_of(item.path))


def pytest_itemcollected(item):
    suite = suite_of(item.path)
    if suite is not None:
        item.add_marker(suite)


def pytest_collection_finish():
    """Leave the modules and the collected tests out of garbage collections; each takes 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Name the plugins that the tests left out; a contributor may want to test them."""
    for file in USER_PLUGINS:
        terminalreporter.write_line(f"not loaded: {file} (untracked; `git add` it to test it)")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _clean_up_launchers():
    """Remove the log handlers and worker processes that Hydra's launchers leave."""
    root = logging.getLogger()
    level = root.level
    handlers = list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False  # logging.config disables loggers that exist already
    loky = sys.modules.get("joblib.externals.loky")
    if loky is not None:
        loky.get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in a temporary folder; return exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line))
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def one_thread():
    """Use one thread: for many steps of small models, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def eager_backend(monkeypatch):
    """Trace compiled functions without generating code, which takes 10 s each."""
    eager = partial(CompiledFunction, backend="eager")
    monkeypatch.setattr(compiled_step, "CompiledFunction", eager)


@pytest.fixture
def forget_plugins():
    """Remove the parts of plugin files after the test."""
    yield
    for name in list(sys.modules):
        if name.startswith("framework_plugin_"):
            del sys.modules[name]
    for registry in Registry.every.values():
        registry.forget_unloaded()
