"""What can be refused without torch and before a weight is read."""

import importlib.util
from pathlib import Path

from launch.errors import ConfigError, ModelError
from launch.hub import fetch
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.remote_code import check_remote_code
from launch.trackers import PACKAGES


def check(recipe: Recipe) -> None:
    """Raises a LaunchError for the first thing that would stop the run later."""
    check_model(recipe.model)
    for tracker in recipe.run.report_to:
        if tracker not in PACKAGES:
            raise ConfigError(f"run.report_to: {tracker!r} is not a tracker; the valid ones are {', '.join(PACKAGES)}.")
        if importlib.util.find_spec(PACKAGES[tracker]) is None:
            raise ConfigError(f"run.report_to: {tracker} is not installed; run pip install {PACKAGES[tracker]}.")


def check_model(model: ModelBlock) -> None:
    """The base model exists: a directory with a config.json, or a hub id whose config.json can be had.

    What it needs of code of its own may run, or is refused.
    """
    name = model.name_or_path
    if name == TINY_MODEL_NAME:
        return
    if model.factory is not None:
        for key, file in (("name_or_path", name), ("factory", model.factory.rpartition(":")[0])):
            if not Path(file).expanduser().is_file():
                raise ModelError(f"model.{key} = {getattr(model, key)}: there is no file {file}.")
        assert model.tokenizer is not None
        files = ["tokenizer_config.json"]
        check_remote_code(model, *fetch("model.tokenizer", model.tokenizer, files, model.revision, ModelError))
        return
    if Path(name).expanduser().is_file():
        raise ModelError(f"model.name_or_path = {name} is a file, which only a model.factory can be filled from.")
    files = ["config.json", "tokenizer_config.json"]
    directory, commit = fetch("model.name_or_path", name, files, model.revision, ModelError)
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.name_or_path = {name} has no config.json, so that it is no model of transformers.")
    check_remote_code(model, directory, commit)
