"""What can be refused without torch and before a weight is read."""

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from launch.errors import ConfigError, ModelError
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.remote_code import check_remote_code

# The trackers of accelerate 1.15 and the package that each one needs.
TRACKERS = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def check(recipe: Recipe) -> None:
    """Raises a LaunchError for the first thing that would stop the run later."""
    check_model(recipe.model)
    for tracker in recipe.run.report_to:
        if tracker not in TRACKERS:
            raise ConfigError(f"run.report_to: {tracker!r} is not a tracker; the valid ones are {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(TRACKERS[tracker]) is None:
            raise ConfigError(f"run.report_to: {tracker} is not installed; run pip install {TRACKERS[tracker]}.")


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
        _check_tokenizer(model)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name_or_path = {name} is a directory without a config.json.")
        check_remote_code(model, path, None)
        return
    if path.is_file():
        raise ModelError(f"model.name_or_path = {name} is a file, which only a model.factory can be filled from.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model.name_or_path = {name} does not exist; give a directory, a hub id (owner/name) or {TINY_MODEL_NAME}."
        )
    try:
        files = ["config.json", "tokenizer_config.json"]
        snapshot = Path(snapshot_download(name, revision=model.revision, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelError(
            f"model.name_or_path = {name} is no directory here and cannot be had from the hub: {reason}."
        ) from None
    if not (snapshot / "config.json").is_file():
        raise ModelError(f"model.name_or_path = {name} is on the hub, but without a config.json.")
    check_remote_code(model, snapshot, snapshot.name)  # a snapshot is named after its commit


def _check_tokenizer(model: ModelBlock) -> None:
    """That of a factory, which may bring code of its own as well."""
    assert model.tokenizer is not None
    path = Path(model.tokenizer).expanduser()
    if path.is_dir():
        check_remote_code(model, path, None)
        return
    try:
        files = ["tokenizer_config.json"]
        snapshot = Path(snapshot_download(model.tokenizer, revision=model.revision, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelError(
            f"model.tokenizer = {model.tokenizer} is no directory here and cannot be had from the hub: {reason}."
        ) from None
    check_remote_code(model, snapshot, snapshot.name)
