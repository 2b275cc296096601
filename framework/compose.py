"""Composition: a command line becomes a checked Spec, through Hydra's own main so that -m, launchers and TAB work."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .discovery import discover
from .errors import ConfigError, FrameworkError, PluginError
from .overrides import Overrides, rewrite
from .sources import Sources
from .spec import Spec, read_spec
from .store import fill_store


@dataclass
class Job:
    """One composed experiment: its specification, and where in a sweep it stands (None outside one)."""

    spec: Spec
    experiment: str
    overrides: list[str]
    number: int | None = None


@dataclass
class CommandLine:
    """What `train` and `plan` take: overrides, Hydra's flags, and ours."""

    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def run(line: CommandLine, task: Callable[[Job], Any]) -> Any:
    """Compose what the command line says and run the task on it (on each job of a sweep).

    Raises ConfigError with every problem, PluginError for plugins that do not load.
    """
    import hydra

    folders = config_folders(line)
    discover([*project_plugins(folders, line.overrides), *line.plugins])
    fill_store()
    overrides = rewrite(line.overrides, folders)
    results: list[Any] = []
    failures: list[Exception] = []

    def job(config: Any) -> None:
        try:
            results.append(task(make_job(config, overrides, folders, line)))
        except Exception as error:  # raised below: Hydra would print its own words about it
            failures.append(error)

    primary = next((folder for folder in reversed(folders) if (folder / "config.yaml").is_file()))
    others = [folder for folder in folders if folder != primary]
    flags = [*line.flags, *(part for folder in others for part in ("--config-dir", str(folder)))]
    main = hydra.main(version_base="1.3", config_path=str(primary), config_name="config")(job)
    with arguments([*flags, *overrides.arguments]), raising():
        main()
    if len(failures) == 1 or (failures and not results):
        raise failures[0]
    if failures:
        raise FrameworkError(f"{len(failures)} of {len(failures) + len(results)} jobs failed; the first: {failures[0]}")
    return results[0] if len(results) == 1 else results


def make_job(config: Any, overrides: Overrides, folders: list[Path], line: CommandLine) -> Job:
    """Check a composed config, with what was wrong on the command line, and report all of it together."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    experiment = hydra_config.runtime.choices.get("experiment") or "default"
    tree = to_tree(config)
    files = [folder / "config.yaml" for folder in folders]
    files += [folder / "experiment" / f"{experiment}.yaml" for folder in folders]
    try:
        spec = read_spec(tree, Sources(overrides.typed, [file for file in files if file.is_file()]))
    except ConfigError as error:
        raise ConfigError([*overrides.problems, *error.problems]) from None
    if overrides.problems:
        raise ConfigError(overrides.problems)
    spec.plugins = [*spec.plugins, *line.plugins]
    sweeping = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    typed = [o.lstrip("+") for o in hydra_config.overrides.task] if sweeping else line.overrides
    return Job(spec, experiment, list(typed), hydra_config.job.num if sweeping else None)


def to_tree(config: Any) -> dict[str, Any]:
    """Return the config in plain values; references to other keys are resolved, those that follow a kind kept."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raw = OmegaConf.to_container(config, resolve=False)
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {str(error.msg).splitlines()[0]}"]) from None
    return keep_following(raw, resolved)


def keep_following(raw: Any, resolved: Any) -> Any:
    """Replace by what was written each resolved value that was a plain reference such as ${activation}."""
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {key: keep_following(raw[key], resolved[key]) for key in raw}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [keep_following(a, b) for a, b in zip(raw, resolved, strict=True)]
    return raw if isinstance(raw, str) and raw.startswith("${") and raw[2:-1].isidentifier() else resolved


def config_folders(line: CommandLine) -> list[Path]:
    """The folders with config files: ours, then the project's `conf` in the working folder, then --config-dir."""
    import framework_conf

    ours = Path(framework_conf.__path__[0]).resolve()
    here = Path("conf").resolve()
    folders = [ours]
    if (here / "config.yaml").is_file() or (here / "experiment").is_dir():
        folders.append(here)
    for folder in line.folders:
        if not folder.is_dir():
            raise FrameworkError(f"--config-dir {folder}: no such folder (looked in {Path.cwd()})")
        folders.append(folder.resolve())
    return list(dict.fromkeys(folders))


def project_plugins(folders: Iterable[Path], overrides: Iterable[str]) -> Iterator[str]:
    """Yield what `plugins:` names in the project's config.yaml and in the chosen experiment, before composing."""
    import yaml

    chosen = [o.partition("=")[2] for o in overrides if o.startswith("experiment=")]
    for folder in folders:
        for file in (folder / "config.yaml", *(folder / "experiment" / f"{name}.yaml" for name in chosen)):
            if not file.is_file():
                continue
            try:
                listed = (yaml.safe_load(file.read_text()) or {}).get("plugins") or []
            except (yaml.YAMLError, AttributeError) as error:
                raise ConfigError([f"{file} cannot be read: {' '.join(str(error).split())}"]) from error
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise PluginError(f"{file}: plugins should be a list of paths or module names, not {listed!r}")
            yield from (locate(plugin, folder) for plugin in listed)


def locate(plugin: str, folder: Path) -> str:
    """Return the path of a plugin named in a config file: from the working folder, the config's, or the one above."""
    for base in (Path.cwd(), folder.parent, folder):
        if (base / plugin).exists():
            return str(base / plugin)
    return plugin


@contextmanager
def arguments(given: list[str]) -> Iterator[None]:
    """Let Hydra read these arguments as the program's."""
    before = sys.argv
    sys.argv = ["framework", *given]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def raising() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them, and give them as ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([words_of(error)]) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def words_of(error: Exception) -> str:
    """Return the line of a Hydra error that names the cause, without its advice to append with +."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in f"{error}\n{cause}".splitlines()]
    lines = [line for line in lines if line and not line.startswith(("To append", "Set the env", "full_key", "object_type"))]
    return "; ".join(dict.fromkeys(lines[:2]))
