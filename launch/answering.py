"""What answers: a whole model, or base and adapter, on the device, and its tokens for a prompt, one by one."""

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from launch import engine as engines
from launch import runs
from launch.adapter import CONFIG_FILE, WEIGHTS_FILE
from launch.config import load_recipe
from launch.errors import ModelError, TemplateError, first_line
from launch.hub import fetch, fetch_model
from launch.machine import choose_precision, read_machine
from launch.merge_from_disk import Source, find_source
from launch.model import (
    added_token_ids,
    choose_template,
    load_base,
    load_tokenizer,
    resolve_base,
    serving_generation_config,
)
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.remote_code import check_remote_code
from launch.saved_embeddings import resize_as_saved
from launch.shards import read_safetensors
from launch.templates import ChatTemplate
from launch.vocabulary import fit_vocabulary

_CONSENT = "give --trust-remote-code"

Answering: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen, in transformers' names; greedily at temperature 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class Speaker:
    """A model that answers, and how it is asked."""

    name: str  # as it was given
    kind: str  # what it is, in which precision, where
    model: Answering
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    stops: tuple[int, ...]
    trust_remote_code: bool


def load_whole(directory: Path, settings: ModelBlock, precision: str) -> Answering:
    """The model of a directory with its own weights, such as a merged one, to answer with."""
    model = load_base(str(directory), settings.model_copy(update={"load_in_4bit": False}), precision)
    assert isinstance(model, PreTrainedModel)
    return _to_answer(model)


def load_adapted(
    base: str,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelBlock,
    precision: str,
    *,
    is_of_a_run: bool,
) -> Answering:
    """Base and adapter to answer with. Raises ModelError for an adapter that is not this base's.

    A run has added the recipe's tokens to the base; what another tool did to it is in the shapes of its adapter.
    """
    model = load_base(base, settings, precision)
    assert isinstance(model, PreTrainedModel)
    if is_of_a_run:
        fit_vocabulary(model, tokenizer, added_token_ids(tokenizer, base, settings), settings)
    else:
        resize_as_saved(model, read_safetensors(adapter / WEIGHTS_FILE))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay as they began
            return _to_answer(PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False))
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:
        raise ModelError(
            f"The adapter {adapter} does not fit {base}: {first_line(error)[:200]}; is this the base it was trained on?"
        ) from None


def _to_answer(model: Answering) -> Answering:
    answering: Answering = model.to(device()).eval()
    return answering


def device() -> torch.device:
    """Where models answer."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stop_token_ids(model: Answering, end_token_ids: list[int]) -> list[int]:
    """The tokens that end an answer: these, and those of the model's own generation config."""
    stops: list[int] = serving_generation_config(_base(model), end_token_ids).eos_token_id
    return stops


@torch.no_grad()
def new_tokens(
    model: Answering,
    prompt: Sequence[int],
    stops: Sequence[int],
    decoding: Decoding,
    *,
    trust_remote_code: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[int]:
    """The new token ids, the end token included. Raises ModelError when the model's own code fails in generate().

    Published remote code often knows a cache of tuples only, which transformers no longer makes.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:  # neutral where not given: left out, generate() would take its own
        top_p, top_k = decoding.top_p or 1.0, decoding.top_k or 0
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": top_p, "top_k": top_k}
    base = _base(model)
    base.generation_config = GenerationConfig(  # the whole of it: generate() would add from the model's own
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else None,
        use_cache=not trust_remote_code,
        **sampling,
    )
    ids = torch.tensor([list(prompt)], device=base.device)
    try:
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    except Exception as error:
        if not trust_remote_code:
            raise
        raise ModelError(
            f"The base's own code failed in generate() with {type(error).__name__}: {first_line(error)}; what was "
            "trained is not touched by that, and can be served with the versions that the code was written for."
        ) from error
    return [int(token) for token in made[0, len(prompt) :]]


def _base(model: Answering) -> PreTrainedModel:
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


# ---- by whatever names a model ----


def load_speaker(
    name: str, *, key: str, base: str | None = None, trust_remote_code: bool = False, like: Speaker | None = None
) -> Speaker:
    """A merged or other whole model, a run, one of its checkpoints, or a directory that PEFT wrote, ready to answer.

    One without a chat template is asked with that of `like`. Raises ModelError (MergeError for an adapter that is not
    whole) for anything else, and TemplateError when there is no chat template.
    """
    path, commit = fetch_model(key, name, None, ModelError)
    if commit is not None and trust_remote_code:
        raise ModelError(
            f"--trust-remote-code is for code that you have read; download {name} and give its directory ({key})."
        )
    engines.quiet_libraries()
    precision, _ = choose_precision("auto", read_machine())
    recipe = load_recipe(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else None
    if recipe is not None:
        _check_run(path, recipe.model)
    whole = path if recipe is None else path / "merged"
    load: Callable[[], Answering]
    if (whole / "config.json").is_file() and not (whole / CONFIG_FILE).is_file():
        if base is not None:
            raise ModelError(f"--base is the base of an adapter, and {whole} is a whole model; leave it out.")
        settings = _settings(recipe, str(whole), trust_remote_code)
        check_remote_code(settings, whole, None, consent=_CONSENT)
        tokenizer, ends = load_tokenizer(str(whole), settings), list[str]()
        kind = "merged model" if (whole / "merge_report.json").is_file() else "whole model"
        load = functools.partial(load_whole, whole, settings, precision)
    elif recipe is not None or (path / CONFIG_FILE).is_file():
        source = find_source(path)
        tokenizer, settings, load = _base_and_adapter(source, base, trust_remote_code, precision)
        ends = list(source.stop_tokens or filter(None, [tokenizer.eos_token]))
        kind = f"base and {source.adapter.name}"
    else:
        raise ModelError(
            f"{key} = {name} holds no model (no config.json, {CONFIG_FILE} or recipe.yaml); give a merged directory, a "
            "run, one of its checkpoints, or a directory that PEFT wrote."
        )
    try:  # before the weights, which may take long
        template = choose_template("tokenizer", tokenizer)
    except TemplateError:
        if like is None:
            raise TemplateError(
                f"The tokenizer of {name} has no chat template, so nobody knows how to ask the model; copy the one "
                "that it was trained with, such as one of templates/chat, to chat_template.jinja beside its tokenizer."
            ) from None
        template, kind = like.template, f"{kind} with the template of {like.name}"
    model = load()
    end_ids = [int(tokenizer.convert_tokens_to_ids(end)) for end in ends]
    stops = stop_token_ids(model, end_ids) or [i for i in (tokenizer.eos_token_id,) if i is not None]
    kind = f"{kind}, {precision} on {device().type}"
    return Speaker(name, kind, model, tokenizer, template, tuple(stops), settings.trust_remote_code)


def _check_run(run: Path, model: ModelBlock) -> None:
    if model.factory is not None:
        raise ModelError(
            "launch chat is for models of transformers, which have a generate(); fill the module of the run's "
            f"model.factory from {run / 'merged' / 'model.pth'} and call it."
        )
    has_any = (run / "merged").is_dir() or (run / "adapter").is_dir() or runs.newest_step(run)
    if not has_any:
        state = runs.read_status(run).get("state", "not started")
        raise ModelError(f"The run in {run} has saved no adapter yet (it is {state}); run train.py until it has.")


def _settings(recipe: Recipe | None, name: str, trust_remote_code: bool) -> ModelBlock:
    """The recipe's. Of a model that none describes: published code rarely has another attention than eager."""
    if recipe is not None:
        return recipe.model.model_copy(
            update={"trust_remote_code": trust_remote_code or recipe.model.trust_remote_code}
        )
    attention: Literal["eager", "sdpa"] = "eager" if trust_remote_code else "sdpa"
    return ModelBlock(name_or_path=name, trust_remote_code=trust_remote_code, attn_implementation=attention)


def _base_and_adapter(
    source: Source, base: str | None, trust_remote_code: bool, precision: str
) -> tuple[PreTrainedTokenizerBase, ModelBlock, Callable[[], Answering]]:
    config = json.loads((source.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    name = base or str(config.get("base_model_name_or_path"))
    settings = _settings(source.recipe, name, trust_remote_code)
    if base is not None:
        settings = settings.model_copy(update={"name_or_path": base, "revision": None})
    elif source.recipe is not None:
        name = resolve_base(source.recipe)
    else:
        settings = settings.model_copy(update={"revision": config.get("revision")})
    if settings.name_or_path != TINY_MODEL_NAME:
        key = "--base" if base else f"The base of {source.adapter} (--base is another)"
        directory, commit = fetch(key, name, ("config.json", "tokenizer_config.json"), settings.revision, ModelError)
        if not (directory / "config.json").is_file():
            raise ModelError(f"{key} = {name} has no config.json, so that it is no model of transformers.")
        check_remote_code(settings, directory, commit, consent=_CONSENT)
    has_its_own = (source.adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(source.adapter) if has_its_own else name, settings)
    is_of_a_run = source.recipe is not None
    load = functools.partial(
        load_adapted, name, source.adapter, tokenizer, settings, precision, is_of_a_run=is_of_a_run
    )
    return tokenizer, settings, load
