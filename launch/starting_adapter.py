"""A PEFT adapter, on disk or on the hub, as the starting point of a run (adapter.init_from)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from launch.adapter import CONFIG_FILE, WEIGHTS_FILE, exported_state, peft_config
from launch.errors import AdapterError
from launch.hub import fetch
from launch.recipe import OLD_LORA_KEYS, AdapterBlock, LoraBlock, PromptTuningBlock

# Keys of a LoRA that may differ: names and shapes of the weights say which modules are trained, and the others do not
# change what the weights mean.
FREE_TO_DIFFER = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
}
PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # others change the base weights too, or what is trained


def fingerprint_starting_adapter(adapter: AdapterBlock) -> str | None:
    """SHA-256 of what the recipe starts from; None when it names no adapter.

    Raises AdapterError when the adapter is not there, or its config is not that of the recipe's.
    """
    if not isinstance(adapter, LoraBlock | PromptTuningBlock) or adapter.init_from is None:
        return None
    directory = _directory_of(adapter.init_from)
    where = f"adapter.init_from = {adapter.init_from}"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            has_pickle = (directory / "adapter_model.bin").is_file()
            remedy = "a .bin is a pickle and is not read, so save it again with PEFT's save_pretrained"
            remedy = remedy if has_pickle else "give the directory that PEFT's save_pretrained wrote"
            raise AdapterError(f"{where} has no {name}; {remedy}.")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise AdapterError(
            f"{where}: its {CONFIG_FILE} holds no keys; give the directory that PEFT's save_pretrained wrote."
        )
    _check_config(where, config, adapter)
    return _digest(directory)


def start_from(adapter: AdapterBlock, sha256: str | None, model: PeftModel) -> None:
    """Put the starting adapter's weights into the model, before the engine takes it; every tensor is used once.

    `sha256` is what `fingerprint_starting_adapter` said on rank zero; None: nothing to do. A run that resumes puts its
    own weights over these. Raises AdapterError when names or shapes differ from what the recipe trains.
    """
    if sha256 is None:
        return
    assert isinstance(adapter, LoraBlock | PromptTuningBlock) and adapter.init_from is not None
    where, directory = f"adapter.init_from = {adapter.init_from}", _directory_of(adapter.init_from)
    if _digest(directory) != sha256:
        raise AdapterError(f"{where} is not the same on every node, or was changed at this moment; make it so.")
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"{where}: its {WEIGHTS_FILE} cannot be read: {error}.") from None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = exported_state(model, trained)  # by the names in the file
    assert {id(parameter) for parameter in parameters.values()} == {id(parameter) for parameter in trained.values()}
    ours = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(name for name in ours.keys() | theirs if ours.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise AdapterError(
            f"{where}: {name} has shape {theirs.get(name, 'none')} there and {ours.get(name, 'none')} in the recipe's "
            f"adapter, {len(different)} such tensors in all; write the adapter block that it was trained with."
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def _directory_of(name: str) -> Path:
    directory, _ = fetch("adapter.init_from", name, (CONFIG_FILE, WEIGHTS_FILE), None, AdapterError)
    return directory


def _digest(directory: Path) -> str:
    digest = hashlib.sha256((directory / CONFIG_FILE).read_bytes())
    with (directory / WEIGHTS_FILE).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_config(where: str, config: dict[str, Any], adapter: LoraBlock | PromptTuningBlock) -> None:
    """Every key that changes what the weights mean must be the recipe's; one that is left out has PEFT's default."""
    for key, instead in OLD_LORA_KEYS.items():
        if key in config:
            raise AdapterError(f"{where}: its {CONFIG_FILE} has {key}, a key of PEFT before 0.3; {instead}.")
    ours, defaults = _plain(peft_config(adapter, model_type="", base="")), _plain(LoraConfig())
    if config.get("peft_type") != ours["peft_type"]:
        raise AdapterError(
            f"{where} is a {config.get('peft_type')} adapter, and the recipe's is {ours['peft_type']}; name one of "
            "that type."
        )
    if isinstance(adapter, PromptTuningBlock):
        return  # all that counts is the shape of the embeddings
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise AdapterError(
            f"{where} was begun with init_lora_weights = {init!r}, which changes more than LoRA's weights; convert it "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained."
        )
    for key in sorted((ours.keys() | config.keys()) - FREE_TO_DIFFER):
        mine, its = ours.get(key), config.get(key, defaults.get(key))
        if key == "modules_to_save":
            mine, its = sorted(mine or []), sorted(its or [])
        if (mine or its) and mine != its:
            remedy = f"set adapter.{key} to that" if key in LoraBlock.model_fields else "it cannot be continued"
            raise AdapterError(f"{where}: {key} is {mine!r} in the recipe and {its!r} in its {CONFIG_FILE}; {remedy}.")


def _plain(config: PeftConfig) -> dict[str, Any]:
    """As it would be read from adapter_config.json."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=list))
    return plain
