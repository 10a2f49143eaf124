"""recipe.yaml and `block.key=value` overrides -> one frozen `Recipe`, or one sentence for what is wrong."""

import difflib
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from launch.errors import ConfigError
from launch.recipe import ADAPTERS, RUN_NAME, LoraBlock, Recipe, Source
from launch.same_run import check_allow_change

DEFAULT_RECIPE = Path("configs/recipes/tiny.yaml")
LAUNCH_COMMAND = "accelerate launch --config_file configs/accelerate/zero3.yaml train.py"
NOT_LAUNCHED = f"train.py runs on DeepSpeed: start it with {LAUNCH_COMMAND}."


class _Yaml(yaml.SafeLoader):
    """YAML with `2e-4` as a number (YAML 1.2 and JSON agree, YAML 1.1 reads a string) and no key given twice.

    Text are, as in YAML 1.2, a date, `1:30:00`, which YAML 1.1 takes for 5400, and `0123`, which it takes for 83.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that _Yaml would read as a number."""


for _side in (_Yaml, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _number_or_text(loader: _Yaml, node: yaml.ScalarNode) -> int | str:
    is_text = ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value)
    return str(node.value) if is_text else loader.construct_yaml_int(node)


_Yaml.add_constructor("tag:yaml.org,2002:int", _number_or_text)
_Yaml.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `block.key=value` overrides.

    `run.name` defaults to the file's stem. Raises ConfigError with one sentence for the first thing that is wrong.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Yaml)
    except FileNotFoundError:
        shipped = ", ".join(str(p) for p in sorted(DEFAULT_RECIPE.parent.glob("*.yaml")))
        raise ConfigError(f"There is no recipe {path}; the recipes shipped are {shipped}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"The recipe {path} is not YAML: {' '.join(str(error).split())}.") from None
    if isinstance(tree, dict):
        tree = {name: {} if block is None else block for name, block in tree.items()}
    if not isinstance(tree, dict) or not all(isinstance(block, dict) for block in tree.values()):
        raise ConfigError(f"The recipe {path} must hold blocks of keys; the blocks are {_choices(Recipe)}.")
    for override in overrides:
        _apply(tree, override)
    tree.setdefault("run", {}).setdefault("name", path.stem)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(path, error)) from None
    try:
        check_allow_change(recipe.run.allow_change)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}.") from None
    return recipe


def parse_command_line(arguments: Sequence[str]) -> Recipe:
    """`[RECIPE.yaml] [block.key=value ...]` -> Recipe; without a recipe, the embedded default."""
    paths = [a for a in arguments if not is_override(a)]
    overrides = [a for a in arguments if is_override(a)]
    if len(paths) > 1:
        raise ConfigError(f"One recipe at a time, but {' and '.join(paths)} were given; overrides are block.key=value.")
    return load_recipe(Path(paths[0]) if paths else DEFAULT_RECIPE, overrides)


def intended_run_directory(arguments: Sequence[str]) -> Path:
    """Where the run would live, for telling that a recipe was refused: good for recipes that do not load, too."""
    paths = [Path(a) for a in arguments if not is_override(a)]
    path = paths[0] if paths else DEFAULT_RECIPE
    block: dict[str, Any] = {}
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Yaml)
        block = dict(tree["run"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        block = {}  # the recipe is what is being refused
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key in ("run.name", "run.output_dir"):
            block[key.removeprefix("run.")] = value
    name = str(block.get("name", path.stem))
    return Path(str(block.get("output_dir", "runs"))) / (name if RUN_NAME.fullmatch(name) else path.stem)


def is_override(argument: str) -> bool:
    """`block.key=value`; a path may have an = as well."""
    is_path = argument.endswith((".yaml", ".yml")) and not re.match(r"\w+\.[^=/]*=", argument)
    return "=" in argument and not is_path


def as_override(block: str, key: str, value: str) -> str:
    """`block.key=value` that is read back as this very text, or as the whole number that it writes."""
    try:
        is_plain = str(yaml.load(value, Loader=_Yaml)) == value
    except yaml.YAMLError:
        is_plain = False
    return f"{block}.{key}={value if is_plain else json.dumps(value)}"


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal Recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _apply(tree: dict[str, Any], override: str) -> None:
    name, _, text = override.partition("=")
    block, dot, key = name.partition(".")
    if not dot or not key:
        raise ConfigError(f"The override {override!r} is not of the form block.key=value, such as train.max_steps=10.")
    try:
        value = yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError:
        value = text  # a plain sentence need not be YAML; its key's type still decides
    tree.setdefault(block, {})[key] = value


def _sentence(path: Path, error: ValidationError) -> str:
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # a misspelt key explains more
    where = _where(first["loc"])
    if first["type"] == "extra_forbidden":
        owner = _owner(first["loc"][:-1])
        known = [_where([*first["loc"][:-1], name]) for name in owner.model_fields]
        key = str(first["loc"][-1])
        blocks = [block for block in Recipe.model_fields if block != "slurm"]
        elsewhere = [f"{block}.{key}" for block in blocks if key in _owner((block,)).model_fields]
        if where in elsewhere:  # only the adapter block has kinds
            return f"{path}: {where} belongs to adapter.type = lora; the valid ones here are {_choices(owner)}."
        near = elsewhere or difflib.get_close_matches(where, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{path}: {where} is not a recipe key; {hint}The valid ones here are {_choices(owner)}."
    if first["type"] == "missing":
        return f"{path}: {where} is required and not given."
    if first["type"] == "value_error":
        return f"{path}: {where + ': ' if where else ''}{first['ctx']['error']}."
    if first["type"] == "union_tag_invalid":
        return f"{path}: {where}.type = {first['ctx']['tag']!r} is not valid; the valid ones are {', '.join(ADAPTERS)}."
    reason = first["msg"][0].lower() + first["msg"][1:].replace("valid tuple", "list, as in [a, b]")
    return f"{path}: {where} = {first['input']!r} is not valid: {reason}."


def _where(location: Sequence[int | str]) -> str:
    """`data.train[0].path`; the kind of an adapter, which pydantic puts between, is no key."""
    parts = [
        part
        for place, part in enumerate(location)
        if not (place == 1 and location[0] == "adapter" and part in ADAPTERS)
        and not (isinstance(part, str) and not part.isidentifier())  # pydantic's name for a choice of types
    ]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _owner(location: Sequence[int | str]) -> type[BaseModel]:
    owner: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):
            owner = Source  # the only list of blocks
        elif part == "adapter":
            owner = LoraBlock
        elif owner is LoraBlock and part in ADAPTERS:
            owner = ADAPTERS[part]
        else:
            annotation = owner.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                owner = annotation
    return owner


def _choices(owner: type[BaseModel]) -> str:
    return ", ".join(owner.model_fields)
