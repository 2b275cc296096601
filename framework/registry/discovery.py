"""Finding plugins: installed packages (entry points), files, folders and modules named by the user. Each file once."""

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import (
    Distribution,
    EntryPoint,
    PackageNotFoundError,
    distributions,
    entry_points,
    version,
)
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from framework.errors import FrameworkError, PluginError, did_you_mean
from framework.errors.exits import describe_exit
from framework.errors.paths import expanded, real_path, shorter
from framework.errors.user_code import describe
from framework.system.signals import received

from .registry import Registry

GROUP = "framework.plugins"
TESTS = ("test", "tests")
"""Packages inside a package of plugins that are not imported."""
OWN = "framework_plugins"
"""The module of the framework's own parts."""


class Installed(NamedTuple):
    """A plugin of an installed package: its entry point in the group `framework.plugins`."""

    name: str
    module: str
    package: str
    version: str
    problem: str = ""  # why the entry points of the package cannot be read

    def __str__(self) -> str:
        return f"{self.name} of package {self.package} {self.version}".rstrip()


def discover(
    plugins: Iterable[str] = (), without: Iterable[str] = (), tolerant: bool = False
) -> list[str]:
    """Load every installed plugin, then those named: a .py file, a folder of them, or an importable module.

    Doing it twice loads nothing twice, however a file is reached. What plugins print goes to standard error: the
    output of a command may be for a program.

    Args:
        plugins: paths and names of modules.
        without: installed plugins that are not loaded, by the name of the entry point or of the package.
        tolerant: go on when an installed plugin does not load. Those in `plugins` must load all the same.

    Returns:
        With `tolerant`, a message for each module of an installed plugin that does not load.

    Raises PluginError naming the plugin that does not load, and why; or a name in `without` that is not installed.
    """
    problems: list[str] = []
    with output_for_programs(True):
        for plugin in leave_out(without, installed_plugins()):
            errors = load_installed(plugin)
            if errors and not tolerant:
                raise with_advice(plugin, errors[0])
            problems += map(str, errors)
        for named in plugins:
            load_plugin(named)
    return problems


def output_for_programs(wanted: bool) -> AbstractContextManager[Any]:
    """Send what parts print to standard error, where the output of a command is for a program."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def installed_plugins() -> list[Installed]:
    """Return the plugins of installed packages, the framework's own first: a name that they have is theirs."""
    try:
        found = [installed(point, point.dist) for point in entry_points(group=GROUP)]
    except Exception:  # the entry points of some package cannot be read
        found = [plugin for package in distributions() for plugin in plugins_of_package(package)]
    return sorted(set(found), key=lambda plugin: (plugin.module != OWN, plugin))


def installed(point: EntryPoint, package: Distribution | None) -> Installed:
    return Installed(point.name, point.value.partition(":")[0].strip(), *name_and_version(package))


def plugins_of_package(package: Distribution) -> Iterator[Installed]:
    """Yield the plugins of a package; of one whose entry points cannot be read, that with its problem."""
    try:
        yield from [
            installed(point, package) for point in package.entry_points if point.group == GROUP
        ]
    except Exception as error:
        with suppress(Exception):
            if GROUP not in (package.read_text("entry_points.txt") or ""):
                return
        name, number = name_and_version(package)
        yield Installed(name, "", name, number, describe(error))


def name_and_version(package: Distribution | None) -> tuple[str, str]:
    try:
        return (
            (package.metadata["Name"] or "", package.metadata["Version"] or "")
            if package is not None
            else ("", "")
        )
    except Exception:  # metadata that is missing or damaged
        return "", ""


def leave_out(without: Iterable[str], plugins: list[Installed]) -> list[Installed]:
    """Return the plugins without those named. Raises PluginError for a name that none has."""
    names = {
        name for plugin in plugins if plugin.module != OWN for name in (plugin.name, plugin.package)
    }
    without = set(without)
    for name in sorted(without - names):
        advice = (
            did_you_mean(name, names)
            if names
            else "no plugin is installed beside the framework's own"
        )
        raise PluginError(
            f"--without-plugin {name}: there is no installed plugin of this name; {advice}"
        )
    return [
        each for each in plugins if each.module == OWN or not without & {each.name, each.package}
    ]


def located(plugin: str) -> str:
    """Return a plugin's absolute path; the name of a module stays as it is."""
    path = expanded(plugin)
    return str(real_path(path)) if path.exists() else plugin


def locate(plugin: str, folder: Path, here: Path | None) -> str:
    """Return the path of a plugin named in a config file; the name of a module stays as it is.

    Args:
        plugin: a path or the name of a module.
        folder: the folder with the config files. The plugin lies beside it, or in it.
        here: the working folder, where the plugin is looked for first; None: it is not.
    """
    bases = [folder.parent, folder] if here is None else [here, folder.parent, folder]
    for base in bases:
        if (base / expanded(plugin)).exists():
            return str(base / expanded(plugin))
    return plugin


@cache
def package_version(name: str) -> str | None:
    """Return the version of an installed package; None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def plugin_files(plugins: Iterable[str]) -> Iterator[Path]:
    """Yield the files that loading these plugins would load first, without loading any."""
    for plugin in plugins:
        path = expanded(plugin)
        if path.is_dir():
            yield from files_in(path)
        elif path.is_file():
            yield path
        else:
            yield from module_files(plugin)


def module_files(name: str) -> Iterator[Path]:
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # no name of a module
        return
    for depth, _ in enumerate(
        rest, 2
    ):  # not find_spec(name), which imports the packages that it is in
        below = ".".join(name.split(".")[:depth])
        spec = spec and PathFinder.find_spec(below, spec.submodule_search_locations or [])
    if spec is not None and spec.origin:
        yield Path(spec.origin)
    if spec is not None:
        for folder in spec.submodule_search_locations or ():
            yield from (file for file in files_in(Path(folder)) if str(file) != spec.origin)


def load_plugin(plugin: str) -> None:
    """Load one plugin: a path to a file or folder, or the name of a module."""
    path = expanded(plugin)
    if path.is_dir():
        files = list(files_in(path))
        if not files:
            raise PluginError(f"plugin {plugin}: there is no .py file in this folder")
        for file in files:
            load_file(file, path)
    elif path.is_file():
        load_file(path)
    elif path.suffix == ".py" or "/" in plugin:
        raise PluginError(f"plugin {plugin}: no such file or folder (looked in {Path.cwd()})")
    else:
        load_module(plugin, "--plugins or the config's `plugins`")


def load_installed(plugin: Installed) -> list[PluginError]:
    """Import the modules of an installed plugin; return the error of each that does not load."""
    if plugin.problem:
        return [
            PluginError(
                f"plugin {plugin} cannot be loaded: its entry points cannot be read: {plugin.problem}"
            )
        ]
    reached_by = (
        f"the entry point {plugin.name!r} of package {plugin.package} {plugin.version}".rstrip()
    )
    errors: list[PluginError] = []
    try:
        with loading(plugin.module, reached_by):
            package = import_once(plugin.module)
    except PluginError as error:
        return [error]
    failed: list[str] = []
    for name in modules_in(package, plugin.module):
        if any(name.startswith(f"{above}.") for above in failed):
            continue
        try:
            with loading(name, reached_by):
                import_once(name)
        except PluginError as error:
            errors.append(error)
            failed.append(name)
    return errors


def with_advice(plugin: Installed, error: PluginError) -> PluginError:
    """Return the error of an installed plugin with the way to leave it out."""
    if plugin.module == OWN:
        return error
    refusal = PluginError(f"{error}. `--without-plugin {shlex.quote(plugin.name)}` leaves it out")
    refusal.__cause__ = error.__cause__
    return refusal


def load_module(name: str, reached_by: str) -> None:
    """Import a module; of a package, each of its modules."""
    with loading(name, reached_by):
        module = import_once(name)
    for below in modules_in(module, name):
        with loading(below, reached_by):
            import_once(below)


def modules_in(package: ModuleType, name: str) -> Iterator[str]:
    """Yield the names of the modules in a package and in the packages in it; nothing for a module that is none."""
    folders = [str(folder) for folder in getattr(package, "__path__", ())]
    yield from modules_below(folders, name, set(map(real_path, folders)))


def modules_below(folders: Sequence[str], name: str, seen: set[Path]) -> Iterator[str]:
    for found in pkgutil.iter_modules(folders):
        if (found.ispkg and not holds_plugins(found.name)) or found.name == "__main__":
            continue
        inner = [str(Path(folder) / found.name) for folder in folders]
        if found.ispkg and seen.intersection(map(real_path, inner)):
            continue  # a link to a folder above
        yield f"{name}.{found.name}"
        if found.ispkg:
            seen.update(map(real_path, inner))
            yield from modules_below(inner, f"{name}.{found.name}", seen)


def holds_plugins(package: str) -> bool:
    """Whether a package inside a folder of plugins is loaded: no tests, and nothing hidden such as .git."""
    return package not in (*TESTS, "__pycache__") and not package.startswith(".")


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the .py files of a folder, and of the packages in it: the folders that have an `__init__.py`.

    The `__init__.py` of a folder comes before its other files, and these before the packages in it.
    Left out are programs (`__main__.py`) and packages of tests.
    """
    pending = [folder]
    seen = set()  # a link may lead back to a folder above
    while pending:
        folder = pending.pop(0)
        if real_path(folder) in seen:
            continue
        seen.add(real_path(folder))
        files = [file for file in sorted(folder.glob("*.py")) if file.stem != "__main__"]
        yield from sorted(files, key=lambda file: file.name != "__init__.py")
        packages = [file.parent for file in sorted(folder.glob("*/__init__.py"))]
        pending = [package for package in packages if holds_plugins(package.name)] + pending


def import_once(name: str) -> ModuleType:
    """Import a module, unless its file is loaded already under another name (by its path)."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        loaded = (
            loaded_from(Path(spec.origin))
            if spec is not None and spec.has_location and spec.origin
            else None
        )
        if loaded is not None:
            return loaded
    return importlib.import_module(name)


def loaded_from(file: Path) -> ModuleType | None:
    """Return the module that was loaded from a file, if there is one."""
    real = real_path(file)
    for module in list(sys.modules.values()):
        loaded = getattr(module, "__dict__", {}).get(
            "__file__"
        )  # a plain getattr would wake lazy modules
        if loaded and loaded.endswith(real.name) and real_path(loaded) == real:
            return module
    return None


def is_loaded(plugin: str) -> bool:
    """Whether a plugin is loaded: of a folder, each file in it."""
    path = Path(os.path.expanduser(plugin))
    if path.is_dir():
        return all(loaded_from(file) is not None for file in files_in(path))
    if path.suffix == ".py" or "/" in plugin:
        return loaded_from(path) is not None
    return plugin in sys.modules


def load_file(file: Path, folder: Path | None = None) -> None:
    """Import a file as a module of a folder, unless it is loaded already under another name.

    The folder is a package, so that its files import each other by `from .other import x`.

    Args:
        file: the file.
        folder: the folder that was named, if the file is in it or in a package in it; None: the file's own.
    """
    real = real_path(file)
    if loaded_from(real) is not None:
        return
    package = package_of(real.parent)
    if folder is not None and real.is_relative_to(real_path(folder)):
        package = package_of(real_path(folder))
        for inner in real.parent.relative_to(real_path(folder)).parts:
            package = f"{package}.{module_name(Path(inner))}"
    name = f"{package}.{module_name(real)}"
    inside = None
    if real.name == "__init__.py":
        name = package
        inside = [str(real.parent)]
    spec = importlib.util.spec_from_file_location(name, real, submodule_search_locations=inside)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with loading(shorter(file), "its path"):
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            advise_relative(error, real.parent)
            raise


def package_of(folder: Path) -> str:
    """Return the name of the package of a folder's plugin files; it is made at the first call."""
    name = f"framework_plugin_{digest(folder)}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


def module_name(file: Path) -> str:
    """Return the name of the module of a file, or the package of a folder, which is an identifier."""
    if file.stem.isidentifier():
        return file.stem
    return f"{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{digest(file)}"


def digest(path: Path) -> str:
    return hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()


def advise_relative(error: BaseException, folder: Path) -> None:
    """Say how to import a file of the plugin's folder, if that is what an import did not find."""
    if not isinstance(error, ModuleNotFoundError):
        return
    missing = error.name or ""
    if missing and (folder / f"{missing}.py").is_file():
        advice = f"{missing}.py is beside the plugin: write `from .{missing} import ...`"
        error.msg = f"{error}; {advice}"


@contextmanager
def loading(what: str, reached_by: str) -> Iterator[None]:
    """Raise PluginError when something does not load, and leave no part of it behind."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a SystemExit: a plugin must not end the program
        if isinstance(error, SystemExit) and received() is not None:
            raise  # because of a signal
        for registry in Registry.every.values():
            registry.forget_unloaded()
        raise failure(what, reached_by, error) from error


def failure(what: str, reached_by: str, error: BaseException) -> PluginError:
    if isinstance(error, FrameworkError):
        reason = str(error)
    elif isinstance(error, SystemExit):
        reason = describe_exit(error)
    else:
        reason = describe(error)
    return PluginError(f"plugin {what} (reached by {reached_by}) cannot be loaded: {reason}")
