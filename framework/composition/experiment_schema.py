"""The JSON schema of an experiment file (conf/experiment/NAME.yaml), for editors.

It describes one file: a part or setting that another file or the command line has to give is not
required. A setting may be a reference such as ${seed}. The draft is 2020-12.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.registry.json_types import JsonType, any_of, or_null, setting_type

from .catalogue import Index
from .config_files import FOREIGN_SETTINGS
from .sections import HYDRA_PLUGINS, HydraPlugin, plugin_settings

DRAFT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE: JsonType = {"$ref": "#/$defs/reference"}
REQUIRED_KINDS = ("model", "data", "task", "optimizer")
"""Kinds of which an experiment needs a part."""
OVERRIDE = r"^((override|optional) +)*/?"
"""The start of a key in a defaults list."""


def experiment_schema(index: Index, files: Mapping[str, Sequence[str]] | None = None) -> JsonType:
    """Return the JSON schema of an experiment file.

    Args:
        index: all parts and sections.
        files: by config key, the config files of the project that can be chosen like parts.
    """
    return Writer(index, files or {}).schema()


def choice_files(folders: Iterable[Path], index: Index) -> dict[str, list[str]]:
    """Return, by config key, the config files that can be chosen like parts: optimizer/mine.yaml.

    Args:
        folders: with config files.
        index: all parts.
    """
    found: dict[str, set[str]] = {}
    for folder in folders:
        for key in index.keys:
            names = {file.stem for file in (folder / key).glob("*.yaml")}
            if names:
                found[key] = found.get(key, set()) | names
    return {key: sorted(names) for key, names in found.items()}


class Writer:
    """Writes the schema of all parts once; see `experiment_schema` for the arguments."""

    def __init__(self, index: Index, files: Mapping[str, Sequence[str]]):
        self.index = index
        self.files = files

    def schema(self) -> JsonType:
        properties: dict[str, Any] = {"defaults": self.defaults_list()}
        for kind, about in self.index.kinds.items():
            if about["composed"]:
                properties[about["key"]] = self.choice(kind)
        for name, settings in self.index.sections.items():
            if name not in self.index.plain:
                properties[name] = settings_object(settings) | {"type": ["object", "null"]}
        for name, setting in self.index.plain.items():
            properties[name] = setting_schema(setting)
        properties["hydra"] = hydra_section()
        definitions: dict[str, Any] = {
            "reference": {
                "description": "a reference to another key, such as ${seed}",
                "type": "string",
                "pattern": r"\$\{.+\}",
            }
        }
        for kind in self.index.kinds:
            definitions |= self.definitions(kind)
        return {
            "$schema": DRAFT,
            "title": "experiment",
            "description": "An experiment file of framework, conf/experiment/NAME.yaml.",
            "type": "object",
            "properties": properties,
            "additionalProperties": False,
            "$defs": definitions,
        }

    # parts

    def names(self, kind: str) -> list[str]:
        """Return the names, then the aliases, of the parts of a kind, then those of files."""
        parts = self.index.kinds[kind]["parts"].values()
        names = [part["name"] for part in parts]
        for part in parts:
            names += part["aliases"]
        return [*names, *self.files.get(self.index.kinds[kind]["key"], ())]

    def name(self, kind: str) -> JsonType:
        """Return the schema of a name, with the descriptions that VS Code shows."""
        names = self.names(kind)
        summaries: dict[str, str] = {}
        for part in self.index.kinds[kind]["parts"].values():
            summaries |= dict.fromkeys([part["name"], *part["aliases"]], part["summary"])
        texts = [summaries.get(name, "") for name in names]
        return {"type": "string", "enum": names, "enumDescriptions": texts}

    def definitions(self, kind: str) -> dict[str, Any]:
        """Return the schema of a part of a kind, and those of the settings of each part."""
        parts = list(self.index.kinds[kind]["parts"].values())
        found: dict[str, Any] = {}
        cases: list[JsonType] = []
        for part in parts:
            found[f"{kind}.{part['name']}"] = part_object(part)
            names = [part["name"], *part["aliases"]]
            is_this = {"required": ["name"], "properties": {"name": {"enum": names}}}
            cases.append({"if": is_this, "then": {"$ref": f"#/$defs/{kind}.{part['name']}"}})
        without_name = {"not": {"required": ["name"]}}
        cases.append({"if": without_name, "then": settings_object(shared_settings(parts))})
        with_name = {
            "type": "object",
            "properties": {"name": {"$ref": f"#/$defs/{kind}.name"}},
            "allOf": cases,
        }
        name = {"$ref": f"#/$defs/{kind}.name"}
        found[f"{kind}.name"] = or_reference(self.name(kind))
        found[kind] = {
            "description": self.index.kinds[kind]["doc"],
            "if": {"type": "object"},
            "then": with_name,
            "else": name,
        }
        return found

    def choice(self, kind: str) -> JsonType:
        """Return the schema of a top-level key that chooses a part, or several."""
        about = self.index.kinds[kind]
        if not about["many"]:
            part: JsonType = {"$ref": f"#/$defs/{kind}"}
            return part if kind in REQUIRED_KINDS else or_null(part)
        item = {"$ref": f"#/$defs/{kind}", "if": {"type": "object"}}
        properties: dict[str, Any] = {}
        for part in about["parts"].values():
            settings = or_null({"$ref": f"#/$defs/{kind}.{part['name']}"})
            properties |= dict.fromkeys([part["name"], *part["aliases"]], settings)
        return {
            "description": about["doc"],
            "type": ["array", "object"],
            "items": item | {"then": {"required": ["name"]}},
            "properties": properties,
            "additionalProperties": False,
        }

    # the defaults list

    def defaults_list(self) -> JsonType:
        """Return the schema of the list of the chosen parts and of the files to build on."""
        patterns: dict[str, Any] = {}
        for kind, about in self.index.kinds.items():
            if not about["composed"]:
                continue
            name = {"$ref": f"#/$defs/{kind}.name"}
            choice = or_null(name)
            if about["many"]:
                several = {"type": "array", "items": name}
                choice = {"if": {"type": "array"}, "then": several, "else": choice}
            patterns[f"{OVERRIDE}(also/)?{about['key']}$"] = choice
        for group in FOREIGN_SETTINGS:
            names = [each.name for each in HYDRA_PLUGINS.values() if each.group == group]
            # Other packages have more; an editor proposes those that are known.
            patterns[f"{OVERRIDE}hydra/{group}$"] = any_of([{"enum": names}, {"type": "string"}])
        entry = {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "patternProperties": patterns,
            "additionalProperties": False,
        }
        bases = {"enum": ["_self_", *self.index.experiments]}
        return {
            "description": "experiments to build on, _self_, and parts: override /optimizer: sgd",
            "type": "array",
            "items": {"if": {"type": "object"}, "then": entry, "else": bases},
        }


# settings


def settings_object(settings: Iterable[Mapping[str, Any]], doc: str = "") -> JsonType:
    """Return the schema of a mapping of settings."""
    schema: JsonType = {"description": doc} if doc else {}
    schema["type"] = "object"
    schema["properties"] = {each["name"]: setting_schema(each) for each in settings}
    schema["additionalProperties"] = False
    return schema


def part_object(part: Mapping[str, Any]) -> JsonType:
    """Return the schema of a mapping with the settings of a part, and perhaps its name."""
    schema = settings_object(part["settings"], part["doc"])
    schema["properties"] = {"name": {}} | schema["properties"]
    return schema


def setting_schema(setting: Mapping[str, Any]) -> JsonType:
    """Return the schema of a setting: its values, its default and its description.

    Args:
        setting: as `setting_as_dict` returns it.
    """
    text = setting["doc"] or setting["type"]
    schema: JsonType = {"description": f"{text} (required)" if setting["required"] else text}
    if setting.get("default") is not None:
        schema["default"] = setting["default"]
    return schema | or_reference(setting["schema"])


def or_reference(schema: JsonType) -> JsonType:
    """Return a schema that also accepts a reference; its errors are those of `schema`."""
    return {"if": REFERENCE, "else": schema}


def shared_settings(parts: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the settings of all parts of a kind; of equal names, with the values of all parts."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for setting in part["settings"]:
            found.setdefault(setting["name"], []).append(setting)
    for name, settings in found.items():
        yield {
            "name": name,
            "type": settings[0]["type"],
            "doc": settings[0]["doc"],
            "required": False,
            "schema": any_of(setting["schema"] for setting in settings),
        }


def hydra_section() -> JsonType:
    """Return the schema of the settings of sweepers and launchers."""
    properties: dict[str, Any] = {}
    for group, foreign in FOREIGN_SETTINGS.items():
        allowed: dict[str, Any] = {name: {} for name in foreign}
        for plugin in HYDRA_PLUGINS.values():
            if plugin.group == group and plugin.in_files:
                allowed |= plugin_properties(plugin)
        properties[group] = {
            "type": "object",
            "properties": allowed,
            "additionalProperties": False,
        }
    return {
        "description": "settings of the sweeper and the launcher of a sweep (-m)",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def plugin_properties(plugin: HydraPlugin) -> dict[str, Any]:
    """Return the schemas of the settings of a sweeper or launcher."""
    found: dict[str, Any] = {}
    for name, setting in plugin_settings(plugin).items():
        schema = or_reference(setting_type(setting))
        found[name] = {"description": setting.doc or setting.type_text} | schema
    return found
