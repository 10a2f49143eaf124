"""Code that a base brings along: what asks for it, whether the recipe lets it run, and which class it loads."""

import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launch.errors import ModelError
from launch.recipe import ModelBlock

# The language model among the classes of an auto_map, by config.model_type: the first that is there. All families
# but these have AutoModelForCausalLM; an AutoModel of theirs is one without a head.
LOADING_CLASSES = {"chatglm": ("AutoModelForCausalLM", "AutoModel", "AutoModelForSeq2SeqLM")}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def loading_class(model_type: str, auto_map: Collection[str]) -> str:
    """The class of transformers that loads the language model of this family."""
    choices = LOADING_CLASSES.get(model_type, ())
    return next((name for name in choices if name in auto_map), "AutoModelForCausalLM")


def check_remote_code(
    model: ModelBlock, directory: Path, commit: str | None, *, consent: str = "set model.trust_remote_code: true"
) -> None:
    """Raises ModelError when the base in `directory` needs code that may not run; warns once of code that will.

    `commit` is the hub's, None for a directory of the user's own; `consent` is what the user does to let it run.
    """
    name = model.tokenizer_name_or_path
    config, tokenizer_config = (_read(directory / file) for file in ("config.json", "tokenizer_config.json"))
    asked = {"config.json": _of_model(config), "tokenizer_config.json": _of_tokenizer(tokenizer_config)}
    asked = {file: references for file, references in asked.items() if references}
    if not asked:
        return
    if not model.trust_remote_code:
        needed = [file for file in asked if not _has_substitute(file, config, tokenizer_config)]
        if needed:
            pin = f" with model.revision: {commit}" if commit else ""
            raise ModelError(
                f"{needed[0]} of {name} asks for code of its own ({', '.join(asked[needed[0]])}), for which "
                "transformers has no substitute and which would run with your rights; read it, and "
                f"{consent}{pin} to let it."
            )
        return
    references = [reference for listed in asked.values() for reference in listed]
    for reference in references:
        owner, separator, _ = reference.partition("--")
        if separator and (commit is None or owner != name):
            raise ModelError(
                f"{name} takes its code from {owner} ({reference}), of which no revision can be pinned; put that "
                f"repository's *.py files beside config.json in a directory, take {owner}-- out of the auto_map there, "
                "and give that directory as model.name_or_path."
            )
    if commit is not None and not _COMMIT.fullmatch(model.revision or ""):
        raise ModelError(
            f"model.trust_remote_code would run whatever code {name} holds on the day of the run; set model.revision "
            f"to the commit whose code you have read ({model.revision or 'the present one'} is {commit})."
        )
    auto_map = config.get("auto_map") or {}
    loader = loading_class(config.get("model_type", ""), auto_map)
    if auto_map and loader not in auto_map and not _has_substitute("config.json", config, tokenizer_config):
        raise ModelError(
            f"The auto_map of {name} names no {loader} (it has {', '.join(auto_map)}), so that transformers cannot "
            "load it as a language model; choose another base."
        )
    modules = sorted({reference.rpartition("--")[2].partition(".")[0] for reference in references})
    place = f"{name} at {commit}" if commit else str(directory)
    print(
        f"Warning: model.trust_remote_code lets {', '.join(f'{module}.py' for module in modules)} of {place} run "
        f"with your rights; the model is loaded by {loader}.",
        file=sys.stderr,
        flush=True,
    )


def _read(path: Path) -> dict[str, Any]:
    """Of a file that a base may do without."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} holds no JSON object: {error}.") from None


def _of_model(config: Mapping[str, Any]) -> list[str]:
    auto_map = config.get("auto_map") or {}
    names = ("AutoConfig", loading_class(config.get("model_type", ""), auto_map))
    return [auto_map[name] for name in names if name in auto_map]


def _of_tokenizer(tokenizer_config: Mapping[str, Any]) -> list[str]:
    """An auto_map has [slow, fast], or is that list itself."""
    auto_map = tokenizer_config.get("auto_map") or {}
    pair = auto_map if isinstance(auto_map, list) else auto_map.get("AutoTokenizer", [])
    return list(filter(None, [pair] if isinstance(pair, str) else pair))


def _has_substitute(file: str, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class of its own, which it then takes; imported here, since that takes seconds."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING
    from transformers.models.auto.tokenization_auto import (
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
        tokenizer_class_from_name,
    )

    model_type = config.get("model_type", "")
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 - get() finds nothing
    if file == "config.json":
        return known in MODEL_FOR_CAUSAL_LM_MAPPING
    named = tokenizer_config.get("tokenizer_class")
    return (
        known in TOKENIZER_MAPPING
        or model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        or (named is not None and tokenizer_class_from_name(named) is not None)
    )
