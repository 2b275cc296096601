"""Finding plugins: installed packages (entry points), files, folders and modules named by the user. Each file once."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from .errors import FrameworkError, PluginError

GROUP = "framework.plugins"


def discover(plugins: Iterable[str] = ()) -> None:
    """Load every installed plugin, then those named: a .py file, a folder of them, or an importable module.

    Doing it twice loads nothing twice, however a file is reached.
    Raises PluginError naming the file that does not load, and why.
    """
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        load_module(point.value.partition(":")[0], f"the entry point {point.name!r} of {GROUP}")
    for plugin in plugins:
        load(plugin)


def load(plugin: str) -> None:
    """Load one plugin: a path to a file or folder, or the name of a module."""
    path = Path(plugin).expanduser()
    if path.is_dir():
        for file in sorted(path.glob("*.py")):
            load_file(file)
    elif path.is_file():
        load_file(path)
    elif path.suffix == ".py" or "/" in plugin:
        raise PluginError(f"plugin {plugin}: no such file or folder (looked in {Path.cwd()})")
    else:
        load_module(plugin, "--plugins or the config's `plugins`")


def load_module(name: str, reached_by: str) -> None:
    """Import a module; of a package, each of its modules."""
    module = attempt(name, lambda: importlib.import_module(name), reached_by)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        full = f"{name}.{found.name}"
        attempt(full, lambda full=full: importlib.import_module(full), reached_by)


def load_file(file: Path) -> None:
    """Import a file under a module name of its own, unless it is loaded already under another."""
    real = file.resolve()
    loaded = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    if real in loaded:
        return
    name = f"framework_plugin_{real.stem}_{hashlib.blake2b(str(real).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        attempt(str(file), lambda: spec.loader.exec_module(module), "its path")
    except PluginError:
        del sys.modules[name]
        raise


def attempt(what: str, load, reached_by: str) -> ModuleType:
    try:
        return load()
    except FrameworkError as error:
        raise PluginError(f"plugin {what} cannot be loaded: {error}") from error
    except Exception as error:
        line = innermost_line(error)
        raise PluginError(
            f"plugin {what} (reached by {reached_by}) cannot be loaded: {type(error).__name__}: {error}{line}"
        ) from error


def innermost_line(error: Exception) -> str:
    """Return " at file:line" of the plugin's own code where the error arose."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file and file != __file__ and not file.startswith("<"):
            found = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
