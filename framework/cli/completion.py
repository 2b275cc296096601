"""Completion with TAB: the possible next words, and scripts for bash, zsh and fish."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from framework.composition.catalogue import Index, find_index
from framework.runs.requests import ACTIONS, SET

from .parsers import DESCRIBE, Command, OptionsRequest

BASH = r"""# TAB completion of framework. To keep it: framework completion bash >> ~/.bashrc
_framework_complete() {
    local words prefix='' candidate line="${COMP_LINE:0:COMP_POINT}" program
    program=$(type -P framework)  # not the first word, which may be a program in the working folder
    [[ $program == /* ]] || return 0
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
    done < <("$program" complete -- "${words[@]:1}" 2>/dev/null)
    [[ ${COMPREPLY[0]} == *[=./,] || ${COMPREPLY[0]} == *\[* ]] && compopt -o nospace
    return 0
}
complete -o default -F _framework_complete framework
"""

ZSH = r"""#compdef framework
# TAB completion of framework. To keep it: framework completion zsh >> ~/.zshrc (after compinit)
_framework() {
    local -a before found open closed
    # not the first word, which may be a program in the working folder
    local program="${commands[framework]}"
    [[ $program == /* ]] || { _files; return }
    before=("${(@Q)words[2,CURRENT-1]}")
    found=("${(@f)$("$program" complete -- "${before[@]}" "${(Q)PREFIX}" 2>/dev/null)}")
    found=("${(@)found:#}")
    (( ${#found} )) || { _files; return }
    open=("${(@M)found:#(*[=./,]|*\[*)}")
    closed=("${(@)found:#(*[=./,]|*\[*)}")
    (( ${#open} )) && compadd -S '' -a open
    (( ${#closed} )) && compadd -a closed
}
compdef _framework framework
"""

FILE_COMMANDS = (
    "resume",
    "rerun",
    "eval",
    "landscape",
    "predict",
    "export",
    "runs",
    "best",
    "diff",
    "watch",
    "tell",
    "board",
    "schema",
    "trust",
)
"""Commands whose words fish completes with the names of files."""

FISH = r"""# TAB completion of framework. To keep it:
# framework completion fish > ~/.config/fish/completions/framework.fish
function __framework_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct | string trim --left --chars "'\"")
    # not the first word, which may be a program in the working folder
    set -l program (command -s framework)
    string match -q '/*' -- $program; or return
    $program complete -- $words[2..-1] "$current" 2>/dev/null
end
complete -c framework -f -a '(__framework_complete)'
complete -c framework -F -n '__fish_seen_subcommand_from convert'
complete -c framework -F -n '__fish_seen_subcommand_from FILE_COMMANDS'
""".replace("FILE_COMMANDS", " ".join(FILE_COMMANDS))


SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
"""The script for each shell."""

Choice = dict[str, Any]
"""A setting, as `setting_as_dict` returns it."""


def answer(words: list[str], commands: Mapping[str, Command]) -> list[str]:
    """Return the completions of the last word, in the working folder; [] after any error.

    Args:
        words: the words after `framework`.
        commands: all commands.
    """
    try:
        index = find_index(
            values_of(words, "--plugins"),
            map(Path, values_of(words, "--config-dir")),
            values_of(words, "--without-plugin"),
        )
        return completions(words, index, commands)
    except Exception:  # a message would break the line that the user types
        return []


def values_of(words: list[str], flag: str) -> list[str]:
    """Return the values of an option in the words before the last."""
    return [word for before, word in pairwise(words[:-1]) if before == flag]


def completions(words: list[str], index: Index, commands: Mapping[str, Command]) -> list[str]:
    """Return the completions of the last word.

    A completion that ends with one of `=./,[` can be continued.

    Args:
        words: the words after `framework`.
        index: all parts.
        commands: all commands.
    """
    *before, current = words or [""]
    if not before:
        return starting(current, commands)
    name = before[0]
    if name in commands:
        found = option_words(current, before[1:], commands[name])
        if found is not None:
            return found
    if before == ["find"]:
        return starting(current, ("lr", "batch_size"))
    if before == ["data"]:
        return starting(current, ("convert",))
    if name == "tour" or (name in commands and commands[name].composes):
        return override_words(current, before[1:], index)
    if name == "list":
        return starting(current, [*index.keys, "experiment"])
    if name == "show":
        return [*part_words(current, index), *setting_words(current, before[1:], index)]
    if name == "completion":
        return starting(current, SCRIPTS)
    if name == "tell" and len(before) > 1:
        return tell_words(current, before, index)
    return []


def option_words(current: str, before: Sequence[str], command: Command) -> list[str] | None:
    """Complete an option of a command, or its value; None if the word is neither.

    Args:
        current: the beginning of the word.
        before: the words between the command and this one.
        command: the command.
    """
    last = before[-1] if before else ""
    if last == "--checkpoint":
        return starting(current, ("best", "last"))
    if not (last.startswith("--") or current.startswith("-")):
        return None
    options = options_of(command)
    choices = options.get(last)
    if choices is not None:
        return starting(current, choices)
    return starting(current, sorted(options)) if current.startswith("-") else None


def options_of(command: Command) -> dict[str, list[str] | None]:
    """Return the options of a command with their choices; None for one that takes no value."""
    try:
        command.function([DESCRIBE])
    except OptionsRequest as request:
        return request.options
    return {}


def tell_words(current: str, before: Sequence[str], index: Index) -> list[str]:
    """Complete a command of `framework tell`; after `set`, a setting of the default optimizer."""
    actions = starting(current, (*ACTIONS, SET))
    if SET not in before:
        return actions
    if current.startswith("optimizer."):
        return path_words(current, {}, index)
    return [*actions, *starting(current, ["optimizer."])]


def starting(current: str, options: Iterable[str]) -> list[str]:
    """Return the options that start with a text."""
    return [option for option in options if option.startswith(current)]


def part_words(current: str, index: Index) -> list[str]:
    """Complete KIND/, then KIND/NAME."""
    kind, slash, _ = current.partition("/")
    if not slash:
        return starting(current, [f"{kind}/" for kind in index.kinds])
    return starting(current, [f"{kind}/{name}" for name in index.parts(kind)])


def setting_words(current: str, before: Sequence[str], index: Index) -> list[str]:
    """Complete KEY.SETTING= for the parts KIND/NAME that are typed before."""
    words = []
    for word in before:
        kind, _, name = word.partition("/")
        if kind in index.kinds:
            key = index.kinds[kind]["key"]
            words += [f"{key}.{setting['name']}=" for setting in index.settings(kind, name)]
    return starting(current, words) if current else []


def override_words(current: str, before: list[str], index: Index) -> list[str]:
    """Complete an override: a key, a path of settings, or the value after `=`.

    Args:
        current: the beginning of the override.
        before: the words between the command and this one.
        index: all parts.
    """
    bare = current.lstrip("+~")
    mark = current[: len(current) - len(bare)]
    typed = dict(word.lstrip("+").split("=", 1) for word in before if "=" in word)
    path, equals, value = bare.partition("=")
    if equals:
        options = values(path, value, typed, index, is_single=bool(mark))
        return [f"{mark}{path}={option}" for option in options]
    return [mark + option for option in path_words(bare, typed, index)]


def path_words(path: str, typed: Mapping[str, str], index: Index) -> list[str]:
    """Return keys and settings that continue a path, with the `=` or `.` that follows."""
    stem, dot, _ = path.rpartition(".")
    if dot:
        follows = "." if stem in index.keys and index.many(stem) else "="
        names = settings_below(stem, typed, index)
        return starting(path, [f"{stem}.{name}{follows}" for name in names])
    options = [f"{key}=" for key in (*index.keys, "experiment")]
    for name, settings in index.sections.items():
        follows = "." if settings else "="
        options.append(f"{name}{follows}")
    if path in index.keys:
        options.append(f"{path}.")
    return sorted(starting(path, options))


def settings_below(path: str, typed: Mapping[str, str], index: Index) -> dict[str, Choice]:
    """Return the settings below a path such as `optimizer`, `callbacks.ema` or `model.activation`.

    Args:
        path: the path, with dots or slashes.
        typed: the values in earlier words, by key.
        index: all parts.
    """
    key, *rest = path.replace("/", ".").split(".")
    if key in index.sections:
        return {} if rest else by_name(index.sections[key])
    if key not in index.keys:
        return {}
    if index.many(key):
        if not rest:
            return {name: {} for name in listed_parts(key, typed, index)}
        name = rest.pop(0)
        below = f"{key}.{name}"
    else:
        name = str(typed.get(key, index.chosen.get(key)))
        below = key
    settings = by_name(index.settings(index.keys[key], name))
    for step in rest:
        choice = settings.get(step)
        if not choice or "part" not in choice:
            return {}
        below = f"{below}.{step}"
        name = typed.get(below, str(choice.get("default")))
        settings = by_name(index.settings(choice["part"], name))
    return settings


def by_name(settings: Iterable[Choice]) -> dict[str, Choice]:
    """Return settings by their names."""
    return {setting["name"]: setting for setting in settings}


def listed_parts(key: str, typed: Mapping[str, str], index: Index) -> list[str]:
    """Return the parts of a list: those in an earlier word, else the default ones, else all."""
    if key in typed:
        return [name for name in typed[key].strip("[]").split(",") if name]
    return list(index.chosen.get(key, ())) or index.parts(index.keys[key])


def values(
    path: str, value: str, typed: Mapping[str, str], index: Index, is_single: bool = False
) -> list[str]:
    """Return the values that complete a value; of a list or sweep a,b,c, the last item.

    Args:
        path: the path before `=`.
        value: the beginning of the value.
        typed: the values in earlier words, by key.
        index: all parts.
        is_single: whether one part needs no brackets, as in +callbacks=ema.
    """
    options, many = options_at(path, typed, index)
    opening = "[" if (many and not is_single) or value.startswith("[") else ""
    *done, last = value.lstrip("[").split(",")
    kept = opening + "".join(f"{item}," for item in done)
    return [kept + option for option in starting(last, options) if option not in done]


def options_at(path: str, typed: Mapping[str, str], index: Index) -> tuple[list[str], bool]:
    """Return the values that a path may have, and whether it takes a list."""
    if path == "experiment":
        return index.experiments, False
    if path in index.keys:
        return index.parts(index.keys[path]), index.many(path)
    stem, _, leaf = path.replace("/", ".").rpartition(".")
    choice = settings_below(stem, typed, index).get(leaf)
    if not choice:
        return [], False
    options = list(choice.get("values", []))
    if "part" in choice:
        options += index.parts(choice["part"])
    return options, choice.get("many", False)
