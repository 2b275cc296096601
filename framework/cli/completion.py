"""TAB: what may come next on the command line, and the scripts by which bash, zsh and fish ask for it."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from framework.composition.catalogue import Index, find_index

VERBS = (
    *("train", "resume", "eval", "predict", "list", "show", "plan", "check", "find"),
    *("trust", "board", "completion"),
)
WITH_OVERRIDES = ("train", "plan", "check", "find")

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
    local -a found open closed
    local program="${commands[framework]}"  # not the first word, which may be a program in the working folder
    [[ $program == /* ]] || { _files; return }
    found=("${(@f)$("$program" complete -- "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
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
    set -l program (command -s framework)  # not the first word, which may be a program in the working folder
    string match -q '/*' -- $program; or return
    $program complete -- $words[2..-1] "$current" 2>/dev/null
end
complete -c framework -f -a '(__framework_complete)'
complete -c framework -F -n '__fish_seen_subcommand_from eval predict board'
"""


SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
"""What each shell must read."""

Choice = dict[str, Any]
"""What may follow `setting=`, as `setting_as_dict` returns it."""


def answer(words: list[str]) -> list[str]:
    """Return what the last word may become, in the working folder; [] when anything is amiss."""
    try:
        folders = map(Path, following(words, "--config-dir"))
        index = find_index(
            following(words, "--plugins"), folders, following(words, "--without-plugin")
        )
        return completions(words, index)
    except Exception:  # half a word is no reason for a message in the middle of a line
        return []


def following(words: list[str], flag: str) -> list[str]:
    """Return the words that stand after a flag."""
    return [word for before, word in pairwise(words[:-1]) if before == flag]


def completions(words: list[str], index: Index) -> list[str]:
    """Return what the last of `words` (after the program's name) may become; several ends mean more is to come."""
    *before, current = words or [""]
    if not before:
        return starting(current, VERBS)
    verb = before[0]
    if before == ["find"]:
        return starting(current, ("lr", "batch_size"))
    if verb in WITH_OVERRIDES:
        return override_words(current, before[1:], index)
    if verb == "list":
        return starting(current, index.keys)
    if verb == "show":
        return part_words(current, index)
    return starting(current, SCRIPTS) if verb == "completion" else []


def starting(current: str, options: Iterable[str]) -> list[str]:
    return [option for option in options if option.startswith(current)]


def part_words(current: str, index: Index) -> list[str]:
    """KIND/ first, then KIND/NAME."""
    kind, slash, _ = current.partition("/")
    if not slash:
        return starting(current, [f"{kind}/" for kind in index.kinds])
    return starting(current, [f"{kind}/{name}" for name in index.parts(kind)])


def override_words(current: str, before: list[str], index: Index) -> list[str]:
    """Complete an override: a key, a path of settings, or the value after `=`."""
    bare = current.lstrip("+~")
    mark = current[: len(current) - len(bare)]
    said = dict(word.lstrip("+").split("=", 1) for word in before if "=" in word)
    path, equals, value = bare.partition("=")
    if equals:
        return [f"{mark}{path}={option}" for option in values(path, value, said, index)]
    return [mark + option for option in path_words(bare, said, index)]


def path_words(path: str, said: Mapping[str, str], index: Index) -> list[str]:
    """Return keys and settings that continue a path, with the `=` or `.` that follows."""
    stem, dot, _ = path.rpartition(".")
    if dot:
        follows = "." if stem in index.keys and index.many(stem) else "="
        return starting(
            path, [f"{stem}.{name}{follows}" for name in settings_below(stem, said, index)]
        )
    options = [f"{key}=" for key in (*index.keys, "experiment")]
    options += [f"{name}." if settings else f"{name}=" for name, settings in index.sections.items()]
    options += [f"{path}."] if path in index.keys else []
    return sorted(starting(path, options))


def settings_below(path: str, said: Mapping[str, str], index: Index) -> dict[str, Choice]:
    """Return the settings below a path such as `optimizer`, `callbacks.checkpoint` or `model.activation`."""
    head, *rest = path.replace("/", ".").split(".")
    if head in index.sections:
        return by_name(index.sections[head]) if not rest else {}
    if head not in index.keys:
        return {}
    many = index.many(head)
    if many and not rest:
        return {name: {} for name in list_words(head, said, index)}
    name = rest.pop(0) if many else said.get(head, index.chosen.get(head))
    settings = by_name(index.settings(index.keys[head], str(name)))
    for number, step in enumerate(rest):
        choice = settings.get(step)
        if not choice or "part" not in choice:
            return {}
        deeper = ".".join([head, *([str(name)] if many else []), *rest[: number + 1]])
        settings = by_name(
            index.settings(choice["part"], said.get(deeper, str(choice.get("default"))))
        )
    return settings


def by_name(settings: Iterable[Choice]) -> dict[str, Choice]:
    return {setting["name"]: setting for setting in settings}


def list_words(key: str, said: Mapping[str, str], index: Index) -> list[str]:
    """The parts of a list: those named in an earlier word, else the usual ones, else all."""
    if key in said:
        return [name for name in said[key].strip("[]").split(",") if name]
    return list(index.chosen.get(key, ())) or index.parts(index.keys[key])


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
        return index.parts(index.keys[path]), index.many(path)
    stem, _, leaf = path.replace("/", ".").rpartition(".")
    choice = settings_below(stem, said, index).get(leaf)
    if not choice:
        return [], False
    parts = index.parts(choice["part"]) if "part" in choice else []
    return choice.get("values", []) + parts, choice.get("many", False)
