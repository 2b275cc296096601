"""TAB: what may come next on the command line, and the scripts by which bash, zsh and fish ask for it.

Candidates come from an index of plain types, which can be kept in a file: with it a TAB does without torch and plugins.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .errors import UnknownName, did_you_mean
from .registry import Registry
from .schema import Setting, members, strip

VERBS = ("train", "resume", "eval", "predict", "list", "show", "plan", "board", "completion")
WITH_OVERRIDES = ("train", "plan")
SHELLS = ("bash", "zsh", "fish")

BASH = r"""# TAB completion of framework. To keep it: framework completion bash >> ~/.bashrc
_framework_complete() {
    local words prefix='' candidate line="${COMP_LINE:0:COMP_POINT}"
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    local last=$((${#words[@]} - 1))
    local current="${words[last]}"
    if [[ $current == [\'\"]* ]]; then
        words[last]="${current:1}"  # inside a quote, bash replaces the whole word
    elif [[ $COMP_WORDBREAKS == *=* ]]; then
        prefix="${current%"${current##*=}"}"  # otherwise only what follows the last =
    fi
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$prefix"}")
    done < <("${words[0]}" complete -- "${words[@]:1}" 2>/dev/null)
    [[ ${COMPREPLY[0]} == *[=./,] || ${COMPREPLY[0]} == *\[* ]] && compopt -o nospace
    return 0
}
complete -o default -F _framework_complete framework
"""

ZSH = r"""#compdef framework
# TAB completion of framework. To keep it: framework completion zsh >> ~/.zshrc (after compinit)
_framework() {
    local -a found open closed
    found=("${(@f)$("${words[1]}" complete -- "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    found=("${(@)found:#}")
    (( ${#found} )) || { _files; return }
    open=("${(@M)found:#(*[=./,]|*\[*)}")
    closed=("${(@)found:#(*[=./,]|*\[*)}")
    (( ${#open} )) && compadd -S '' -a open
    (( ${#closed} )) && compadd -a closed
}
compdef _framework framework
"""

FISH = r"""# TAB completion of framework. To keep it:
# framework completion fish > ~/.config/fish/completions/framework.fish
function __framework_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct | string trim --left --chars "'\"")
    $words[1] complete -- $words[2..-1] "$current" 2>/dev/null
end
complete -c framework -f -a '(__framework_complete)'
complete -c framework -F -n '__fish_seen_subcommand_from eval predict board'
"""


def script(shell: str) -> str:
    """Return the script that a shell must read. Raises UnknownName for another shell."""
    scripts = {"bash": BASH, "zsh": ZSH, "fish": FISH}
    if shell not in scripts:
        raise UnknownName(f"there is no completion for {shell!r}; {did_you_mean(shell, SHELLS)}")
    return scripts[shell]


Choice = dict[str, Any]
"""What may follow `setting=`: {"values": [...], "part": kind or None, "many": bool, "default": name or None}."""


@dataclass
class Index:
    """All that can be completed, in plain types.

    Attributes:
        keys: config key of each kind -> {"kind": its name, "many": whether it takes a list}.
        parts: kind -> part -> setting -> choice.
        sections: other top-level keys -> setting -> choice; of a plain value such as `seed`, no settings.
        experiments: names for `experiment=`.
        chosen: config key -> the part, or parts, that an experiment has when nothing else is said.
    """

    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, dict[str, dict[str, Choice]]] = field(default_factory=dict)
    sections: dict[str, dict[str, Choice]] = field(default_factory=dict)
    experiments: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)


def read_index(
    sections: Mapping[str, Mapping[str, Setting]] | None = None,
    experiments: Iterable[str] = (),
    chosen: Mapping[str, Any] | None = None,
) -> Index:
    """Return the index of all registered parts; see `Index` for the arguments."""
    registries = Registry.every.values()
    return Index(
        keys={r.kind.key: {"kind": r.kind.name, "many": r.kind.many} for r in registries},
        parts={r.kind.name: {e.name: choices(e.settings) for e in r} for r in registries},
        sections={name: choices(settings) for name, settings in (sections or {}).items()},
        experiments=sorted(experiments),
        chosen=dict(chosen or {}),
    )


def choices(settings: Mapping[str, Setting]) -> dict[str, Choice]:
    return {name: choice_of(setting) for name, setting in settings.items()}


def choice_of(setting: Setting) -> Choice:
    values: list[str] = []
    for member in map(strip, members(setting.annotation)):
        if member is bool:
            values += ["false", "true"]
        elif get_origin(member) is Literal:
            values += map(str, get_args(member))
        elif member in (None, type(None)):
            values.append("null")
    default = setting.default if isinstance(setting.default, str) else None
    return {"values": values, "part": setting.part, "many": setting.many, "default": default}


def stored_index(file: Path, build: Callable[[], Index], watch: Iterable[Path] = ()) -> Index:
    """Return the index kept in `file`, or a fresh one when a plugin file, `watch` or what is installed has changed.

    `build` discovers the plugins and reads the index; the file is replaced whole, and left alone if it cannot be.
    """
    try:
        kept = json.loads(file.read_text())
        if kept["stamps"] == stamps([Path(path) for path in kept["stamps"]]):
            return Index(**kept["index"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none yet, or of another version
    index = build()
    text = json.dumps({"stamps": stamps(watched(watch)), "index": asdict(index)}, default=str)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_text(text)
        os.replace(beside, file)
    except OSError:
        pass  # a home that cannot be written: slower, not wrong
    return index


def watched(more: Iterable[Path]) -> list[Path]:
    """The files with parts, their folders (a new file may appear) and the folders where packages are installed."""
    files = {Path(entry.registered.file) for registry in Registry.every.values() for entry in registry}
    installed = {Path(folder) for folder in sys.path if folder}
    return sorted({*files, *(file.parent for file in files), *installed, *more})


def stamps(paths: Iterable[Path]) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns if path.exists() else 0 for path in paths}


def answer(words: list[str]) -> list[str]:
    """Return what the last word may become, from a kept index of the working folder; [] when anything is amiss."""
    folders = [Path("conf").resolve(), *(Path(word).resolve() for word in following(words, "--config-dir"))]
    plugins = following(words, "--plugins")
    key = hashlib.blake2b(repr([*map(str, folders), *plugins]).encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    watch = [path for folder in folders for path in (folder, folder / "config.yaml", folder / "experiment")]
    try:
        build = partial(index_of, [folder for folder in folders[1:] if folder.is_dir()], plugins)
        index = stored_index(cache / "framework" / f"tab-{key}.json", build, [*watch, *map(Path, plugins)])
        return candidates(words, index)
    except Exception:  # half a word is no reason for a message in the middle of a line
        return []


def index_of(folders: list[Path], plugins: list[str]) -> Index:
    """Load the plugins and read the index of an experiment composed in the working folder."""
    from .compose import CommandLine, config_folders  # not at the top: a TAB with a kept index does without
    from .discovery import discover
    from .sources import chosen_in, experiments_in
    from .spec import PLAIN, SECTIONS, section_settings

    discover(plugins)
    found = config_folders(CommandLine(folders=folders))
    sections: dict[str, Mapping[str, Setting]] = {name: section_settings(name) for name in SECTIONS}
    return read_index(sections | {name: {} for name in PLAIN}, experiments_in(found), chosen_in(found))


def following(words: list[str], flag: str) -> list[str]:
    """Return the words that stand after a flag."""
    return [word for before, word in pairwise(words[:-1]) if before == flag]


def candidates(words: list[str], index: Index) -> list[str]:
    """Return what the last of `words` (after the program's name) may become; several ends mean more is to come."""
    *before, current = words or [""]
    if not before:
        return starting(current, VERBS)
    verb = before[0]
    if verb in WITH_OVERRIDES:
        return override(current, before[1:], index)
    if verb == "list":
        return starting(current, index.keys)
    if verb == "show":
        return shown(current, index)
    return starting(current, SHELLS) if verb == "completion" else []


def starting(current: str, options: Iterable[str]) -> list[str]:
    return [option for option in options if option.startswith(current)]


def shown(current: str, index: Index) -> list[str]:
    """KIND/ first, then KIND/NAME."""
    kind, slash, _ = current.partition("/")
    if not slash:
        return starting(current, [f"{kind}/" for kind in index.parts])
    return starting(current, [f"{kind}/{name}" for name in sorted(index.parts.get(kind, {}))])


def override(current: str, before: list[str], index: Index) -> list[str]:
    """Complete an override: a key, a path of settings, or the value after `=`."""
    bare = current.lstrip("+~")
    mark = current[: len(current) - len(bare)]
    said = dict(word.lstrip("+").split("=", 1) for word in before if "=" in word)
    path, equals, value = bare.partition("=")
    if equals:
        return [f"{mark}{path}={option}" for option in values(path, value, said, index)]
    return [mark + option for option in paths(bare, said, index)]


def paths(path: str, said: Mapping[str, str], index: Index) -> list[str]:
    """Return keys and settings that continue a path, with the `=` or `.` that follows."""
    stem, dot, _ = path.rpartition(".")
    if dot:
        follows = "." if index.keys.get(stem, {}).get("many") else "="
        return starting(path, [f"{stem}.{name}{follows}" for name in settings_at(stem, said, index)])
    options = [f"{key}=" for key in (*index.keys, "experiment")]
    options += [f"{name}." if settings else f"{name}=" for name, settings in index.sections.items()]
    options += [f"{path}."] if path in index.keys else []
    return sorted(starting(path, options))


def settings_at(path: str, said: Mapping[str, str], index: Index) -> dict[str, Choice]:
    """Return the settings below a path such as `optimizer`, `callbacks.checkpoint` or `model.activation`."""
    head, *rest = path.replace("/", ".").split(".")
    if head in index.sections:
        return index.sections[head] if not rest else {}
    if head not in index.keys:
        return {}
    kind, many = index.keys[head]["kind"], index.keys[head]["many"]
    if many and not rest:
        return {name: {} for name in chosen_names(head, said, index)}
    name = rest.pop(0) if many else said.get(head, index.chosen.get(head))
    settings = index.parts[kind].get(str(name), {})
    for number, step in enumerate(rest):
        choice = settings.get(step)
        if not choice or not choice["part"]:
            return {}
        deeper = ".".join([head, *([str(name)] if many else []), *rest[: number + 1]])
        settings = index.parts[choice["part"]].get(said.get(deeper, choice["default"]) or "", {})
    return settings


def chosen_names(key: str, said: Mapping[str, str], index: Index) -> list[str]:
    """The parts of a list: those named in an earlier word, else the usual ones, else all."""
    if key in said:
        return [name for name in said[key].strip("[]").split(",") if name]
    return list(index.chosen.get(key, ())) or sorted(index.parts[index.keys[key]["kind"]])


def values(path: str, value: str, said: Mapping[str, str], index: Index) -> list[str]:
    """Return values for a path; the last item of a list (or of a sweep a,b,c) is completed, once each."""
    options, many = options_at(path, said, index)
    opening = "[" if many or value.startswith("[") else ""
    *done, last = value.lstrip("[").split(",")
    kept = opening + "".join(f"{item}," for item in done)
    return [kept + option for option in options if option.startswith(last) and option not in done]


def options_at(path: str, said: Mapping[str, str], index: Index) -> tuple[list[str], bool]:
    """Return the values that a path may have, and whether it takes a list."""
    if path == "experiment":
        return index.experiments, False
    if path in index.keys:
        return sorted(index.parts[index.keys[path]["kind"]]), index.keys[path]["many"]
    stem, _, leaf = path.replace("/", ".").rpartition(".")
    choice = settings_at(stem, said, index).get(leaf)
    if not choice:
        return [], False
    return choice["values"] + sorted(index.parts.get(choice["part"] or "", {})), choice["many"]
