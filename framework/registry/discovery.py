"""Plugin discovery: load installed packages (entry points), and files, folders and modules by name.

Each file is loaded once, also if it is found in several places.
"""

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
OWN = "framework_plugins"  # the module of the built-in parts
NOT_LOADED = ("test", "tests", "__pycache__")  # packages inside a package of plugins


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
    """Load every installed plugin, then the plugins in `plugins`. Each file is loaded once.

    Output of plugins goes to standard error, because a program may read the standard output.

    Args:
        plugins: .py files, folders of them, and names of importable modules.
        without: installed plugins that are not loaded, by the name of the entry point or package.
        tolerant: continue if an installed plugin does not load. Those in `plugins` must load.

    Returns:
        With `tolerant`, a message for each module of an installed plugin that does not load.

    Raises:
        PluginError: a plugin does not load, or a name in `without` is not installed.
    """
    problems: list[str] = []
    with output_for_programs(True):
        for installed in leave_out(without, installed_plugins()):
            errors = load_installed(installed)
            if errors and not tolerant:
                raise with_advice(installed, errors[0])
            problems += map(str, errors)
        for plugin in plugins:
            load_plugin(plugin)
    return problems


def output_for_programs(wanted: bool) -> AbstractContextManager[Any]:
    """Send the output of parts to standard error, if a program reads that of the command."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def installed_plugins() -> list[Installed]:
    """Return the plugins of installed packages, the built-in ones first: their names are taken."""
    try:
        found = {as_installed(point, point.dist) for point in entry_points(group=GROUP)}
    except Exception:  # the entry points of one of the packages cannot be read
        found = set()
        for package in distributions():
            found.update(plugins_of_package(package))
    return sorted(found, key=lambda plugin: (plugin.module != OWN, plugin))


def plugins_of_package(package: Distribution) -> list[Installed]:
    """Return the plugins of a package, or one with a problem if the entry points are unreadable."""
    try:
        points = [point for point in package.entry_points if point.group == GROUP]
        return [as_installed(point, package) for point in points]
    except Exception as error:
        with suppress(Exception):
            if GROUP not in (package.read_text("entry_points.txt") or ""):
                return []
        name, number = name_and_version(package)
        return [Installed(name, "", name, number, describe(error))]


def as_installed(point: EntryPoint, package: Distribution | None) -> Installed:
    """Return the plugin of an entry point."""
    name, number = name_and_version(package)
    return Installed(point.name, point.value.partition(":")[0].strip(), name, number)


def name_and_version(package: Distribution | None) -> tuple[str, str]:
    """Return the name and the version of a package; empty if they are unknown."""
    if package is None:
        return "", ""
    try:
        return package.metadata["Name"] or "", package.metadata["Version"] or ""
    except Exception:  # metadata are missing or damaged
        return "", ""


def leave_out(without: Iterable[str], plugins: list[Installed]) -> list[Installed]:
    """Return the plugins except those in `without`, which are names of plugins or packages.

    Raises:
        PluginError: no plugin has one of the names.
    """
    excluded = set(without)
    kept: list[Installed] = []
    names: set[str] = set()
    for plugin in plugins:
        own_names = set() if plugin.module == OWN else {plugin.name, plugin.package}
        names |= own_names
        if not excluded & own_names:
            kept.append(plugin)
    for name in sorted(excluded - names):
        advice = "only the built-in plugins are installed"
        if names:
            advice = did_you_mean(name, names)
        raise PluginError(
            f"--without-plugin {name}: there is no installed plugin {name!r}; {advice}"
        )
    return kept


def located(plugin: str) -> str:
    """Return a plugin's absolute path; the name of a module is returned unchanged."""
    path = expanded(plugin)
    return str(real_path(path)) if path.exists() else plugin


def locate(plugin: str, folder: Path, here: Path | None) -> str:
    """Return the path of a plugin in a config file; the name of a module is returned unchanged.

    Args:
        plugin: a path or the name of a module.
        folder: the folder of the config files. Its parent and then itself are searched.
        here: the working folder, which is searched first; None to leave it out.
    """
    bases = [folder.parent, folder] if here is None else [here, folder.parent, folder]
    for base in bases:
        if (base / expanded(plugin)).exists():
            return str(base / expanded(plugin))
    return plugin


@cache
def package_version(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def plugin_files(plugins: Iterable[str]) -> Iterator[Path]:
    """Yield the files of plugins, without loading them."""
    for plugin in plugins:
        path = expanded(plugin)
        if path.is_dir():
            yield from files_in(path)
        elif path.is_file():
            yield path
        else:
            yield from module_files(plugin)


def module_files(name: str) -> Iterator[Path]:
    """Yield the file of a module and, for a package, those of its modules.

    `importlib.util.find_spec` would import the parent packages of the module.
    """
    module, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # not the name of a module
        return
    for part in rest:
        if spec is None:
            return
        module = f"{module}.{part}"
        spec = PathFinder.find_spec(module, spec.submodule_search_locations or [])
    if spec is None:
        return
    if spec.origin:
        yield Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        for file in files_in(Path(folder)):
            if str(file) != spec.origin:
                yield file


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
        raise PluginError(f"plugin {plugin}: no such file or folder (searched {Path.cwd()})")
    else:
        load_module(plugin, "--plugins or the config's `plugins`")


def load_installed(plugin: Installed) -> list[PluginError]:
    """Import the modules of an installed plugin; return the error of each that does not load."""
    if plugin.problem:
        return [
            PluginError(
                f"plugin {plugin} cannot be loaded: "
                f"its entry points cannot be read: {plugin.problem}"
            )
        ]
    package_name = f"{plugin.package} {plugin.version}".rstrip()
    reached_by = f"the entry point {plugin.name!r} of package {package_name}"
    errors: list[PluginError] = []
    try:
        with loading(plugin.module, reached_by):
            package = import_once(plugin.module)
    except PluginError as error:
        return [error]
    failed: list[str] = []
    for name in modules_in(package, plugin.module):
        if any(name.startswith(f"{parent}.") for parent in failed):
            continue
        try:
            with loading(name, reached_by):
                import_once(name)
        except PluginError as error:
            errors.append(error)
            failed.append(name)
    return errors


def with_advice(plugin: Installed, error: PluginError) -> PluginError:
    """Return the error of an installed plugin with the option that leaves it out."""
    if plugin.module == OWN:
        return error
    advised = PluginError(f"{error}. `--without-plugin {shlex.quote(plugin.name)}` leaves it out")
    advised.__cause__ = error.__cause__
    return advised


def load_module(name: str, reached_by: str) -> None:
    """Import a module and, for a package, each of its modules."""
    with loading(name, reached_by):
        module = import_once(name)
    for submodule in modules_in(module, name):
        with loading(submodule, reached_by):
            import_once(submodule)


def modules_in(package: ModuleType, name: str) -> Iterator[str]:
    """Yield the names of the modules in a package, at any depth; none for a simple module."""
    folders = [str(folder) for folder in getattr(package, "__path__", ())]
    yield from modules_below(folders, name, set(map(real_path, folders)))


def modules_below(folders: Sequence[str], name: str, seen: set[Path]) -> Iterator[str]:
    """Yield the names of the modules in the folders of a package.

    Args:
        folders: of the package; several for a namespace package.
        name: of the package.
        seen: real paths of the folders that were searched; a link may lead back to a parent.
    """
    for module in pkgutil.iter_modules(folders):
        full_name = f"{name}.{module.name}"
        if module.name == "__main__":
            continue
        if not module.ispkg:
            yield full_name
            continue
        inner = [str(Path(folder) / module.name) for folder in folders]
        real = set(map(real_path, inner))
        if not holds_plugins(module.name) or seen & real:
            continue
        seen |= real
        yield full_name
        yield from modules_below(inner, full_name, seen)


def holds_plugins(package: str) -> bool:
    """Return whether a package in a folder of plugins is loaded; tests and hidden ones are not."""
    return package not in NOT_LOADED and not package.startswith(".")


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the .py files of a folder and of its packages (folders with an `__init__.py`).

    The `__init__.py` of a folder comes first, then its other files, then its packages. Programs
    (`__main__.py`) and packages of tests are left out.
    """
    pending = [folder]
    seen = set()  # a link may lead back to a parent folder
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
    """Import a module, unless its file is already loaded under another name (by its path)."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None and spec.has_location and spec.origin:
        loaded = loaded_from(Path(spec.origin))
        if loaded is not None:
            return loaded
    return importlib.import_module(name)


def loaded_from(file: Path) -> ModuleType | None:
    """Return the module that was loaded from a file; None if there is none."""
    real = real_path(file)
    for module in list(sys.modules.values()):
        attributes = getattr(module, "__dict__", {})  # lazy modules react to getattr
        loaded = attributes.get("__file__")
        if loaded and loaded.endswith(real.name) and real_path(loaded) == real:
            return module
    return None


def is_loaded(plugin: str) -> bool:
    """Return whether a plugin is loaded; for a folder, each of its files."""
    path = Path(os.path.expanduser(plugin))
    if path.is_dir():
        return all(loaded_from(file) is not None for file in files_in(path))
    if path.suffix == ".py" or "/" in plugin:
        return loaded_from(path) is not None
    return plugin in sys.modules


def load_file(file: Path, folder: Path | None = None) -> None:
    """Import a file as a module of a folder, unless it is already loaded under another name.

    The folder is a package, so that its files import each other by `from .other import x`.

    Args:
        folder: the folder of the plugin, of which the file may be in a package; None for the
            folder of the file.
    """
    real = real_path(file)
    if loaded_from(real) is not None:
        return
    top = real.parent if folder is None else real_path(folder)
    if not real.is_relative_to(top):  # a link to another folder
        top = real.parent
    package = plugin_package(top)
    for inner in real.parent.relative_to(top).parts:
        package = f"{package}.{module_name(Path(inner))}"
    name = f"{package}.{module_name(real)}"
    search_folders = None
    if real.name == "__init__.py":
        name = package
        search_folders = [str(real.parent)]
    spec = importlib.util.spec_from_file_location(
        name, real, submodule_search_locations=search_folders
    )
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


def plugin_package(folder: Path) -> str:
    """Return the name of the package of a folder's plugin files; the first call creates it."""
    name = f"framework_plugin_{digest(folder)}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


def module_name(file: Path) -> str:
    """Return an identifier for the module of a file or the package of a folder."""
    if file.stem.isidentifier():
        return file.stem
    return f"{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{digest(file)}"


def digest(path: Path) -> str:
    """Return eight hexadecimal digits that distinguish a path."""
    return hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()


def advise_relative(error: BaseException, folder: Path) -> None:
    """Add advice to an import error for a file of the plugin's own folder."""
    if not isinstance(error, ModuleNotFoundError):
        return
    missing = error.name or ""
    if missing and (folder / f"{missing}.py").is_file():
        error.msg = (
            f"{error}; {missing}.py is in the plugin's folder: write `from .{missing} import ...`"
        )


@contextmanager
def loading(plugin: str, reached_by: str) -> Iterator[None]:
    """Raise PluginError if a plugin does not load; its parts are removed from the registries.

    Args:
        plugin: the name of a module or the path of a file.
        reached_by: an entry point, an option or a path, for the message.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a SystemExit: a plugin must not end the program
        if isinstance(error, SystemExit) and received() is not None:
            raise  # a signal ends the command
        for registry in Registry.every.values():
            registry.forget_unloaded()
        raise load_error(plugin, reached_by, error) from error


def load_error(plugin: str, reached_by: str, error: BaseException) -> PluginError:
    """Return the error of a plugin that does not load."""
    if isinstance(error, FrameworkError):
        reason = str(error)
    elif isinstance(error, SystemExit):
        reason = describe_exit(error)
    else:
        reason = describe(error)
    return PluginError(f"plugin {plugin} (reached by {reached_by}) cannot be loaded: {reason}")
