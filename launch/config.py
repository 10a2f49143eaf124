"""recipe.yaml and `block.key=value` overrides -> one frozen `Recipe`; every default of the project stands here."""

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from launch.errors import ConfigError

DEFAULT_RECIPE = Path("configs/recipes/tiny.yaml")
TINY_MODEL_NAME = "tiny-qwen2"  # not on any hub: built on the spot

_RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML has lists, a frozen recipe has tuples


class Block(BaseModel):
    """A block of the recipe: unknown keys are errors, values keep their type, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelBlock(Block):
    """The base model: a hub id, a local directory, or `tiny-qwen2`, which is built on the spot."""

    name_or_path: str = Field(min_length=1)
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"


Format = Literal["auto", "messages", "sharegpt", "alpaca", "question_answer", "prompt_completion"]


class Source(Block):
    """Where rows come from: a file, a directory of files, or a hub id. What is None is as in the data block."""

    path: str = Field(min_length=1)
    subset: str | None = None  # of a hub id
    split: str = "train"  # of a hub id
    format: Format | None = None
    prompt_template: str | None = None
    answer_column: str | None = None
    weight: float = Field(1.0, gt=0, le=100)  # copies of a row in an epoch; 0.25: one row in four, chosen by the seed
    max_rows: int | None = Field(None, ge=1)  # at most so many usable rows, chosen by the seed


def _listed(value: object) -> object:
    """`ROWS.jsonl` and a list of paths are short for a list of sources."""
    values = value if isinstance(value, list | tuple) else [value]
    for item in values:
        if not isinstance(item, str | dict | Source):
            raise ValueError(f"a source is a path or {{path: ..., weight: ...}}, but this is {item!r}")
    return tuple({"path": item} if isinstance(item, str) else item for item in values)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_listed)]


class DataBlock(Block):
    """The rows and how they become samples."""

    train: Sources = Field(min_length=1)
    evaluation: Sources = ()
    test_size: float | None = Field(None, ge=0)  # held out of train: below 1 a share, from 1 a number; None: 0.1
    format: Format = "auto"
    prompt_template: str | None = None  # templates/prompt/<name>.jinja: a row of any columns -> the user turn
    answer_column: str = "output"  # of alpaca, question_answer and prompt templates
    template: str = Field(min_length=1)  # templates/chat/<name>.jinja, or tokenizer: the model's own
    system: str | None = None  # the system message of conversations that have none
    train_on: Literal["all", "last"] = "all"  # answers of a conversation
    max_length: int = Field(1024, ge=8)  # tokens
    overlong: Literal["drop", "truncate", "error"] = "drop"  # truncate: the last answers go, none is cut
    bad_rows: Literal["quarantine", "error"] = "quarantine"
    drop_duplicates: bool = False
    max_dropped_share: float = Field(0.05, ge=0, le=1)  # of all rows


class LoraBlock(Block):
    """LoRA, in PEFT's names."""

    type: Literal["lora"] = "lora"
    r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    # A list of names, all-linear (but the output head), or a regular expression for whole paths; None: the family's.
    target_modules: Names | str | None = None
    modules_to_save: Names = ()

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens before each sample that no row holds."""
        return 0

    @property
    def num_virtual_columns(self) -> int:
        """Columns of the logits before those of a sample."""
        return 0


class SoftPromptBlock(Block):
    """What is trained stands before each sample, the base stays as it is; in PEFT's names."""

    num_virtual_tokens: int = Field(10, ge=1)

    @property
    def num_virtual_columns(self) -> int:
        """Columns of the logits before those of a sample."""
        return self.num_virtual_tokens


class PromptTuningBlock(SoftPromptBlock):
    """Prompt tuning: embeddings before each sample."""

    type: Literal["prompt_tuning"]
    prompt_tuning_init: Literal["RANDOM", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None


class PTuningBlock(SoftPromptBlock):
    """P-tuning: embeddings before each sample that an encoder makes."""

    type: Literal["p_tuning"]
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = Field(None, ge=1)  # None: the model's
    encoder_num_layers: int = Field(2, ge=1)
    encoder_dropout: float = Field(0.0, ge=0, lt=1)


class PrefixTuningBlock(SoftPromptBlock):
    """Prefix tuning: keys and values before each sample in every layer."""

    type: Literal["prefix_tuning"]
    prefix_projection: bool = False
    encoder_hidden_size: int | None = Field(None, ge=1)  # of the projection; None: the model's

    @property
    def num_virtual_columns(self) -> int:
        """None: keys and values have no logits."""
        return 0


ADAPTERS: dict[str, type[Block]] = {
    "lora": LoraBlock,
    "p_tuning": PTuningBlock,
    "prefix_tuning": PrefixTuningBlock,
    "prompt_tuning": PromptTuningBlock,
}
AdapterBlock = LoraBlock | PTuningBlock | PrefixTuningBlock | PromptTuningBlock


def _typed(value: object) -> object:
    return {"type": "lora", **value} if isinstance(value, dict) else value


class TrainBlock(Block):
    """The optimizer steps, in the names of transformers' TrainingArguments where it has one."""

    global_batch_size: int = Field(32, ge=1)  # samples per optimizer step, over all ranks
    max_tokens_per_micro_batch: int = Field(4096, ge=8)  # per rank; memory, not results, depends on it
    packing: Literal["auto", "off"] = "auto"  # auto: packed rows unless the model is seen to leak between samples
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # overrides num_train_epochs
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1)  # of all steps; used when warmup_steps is 0
    max_grad_norm: float = Field(1.0, ge=0)  # 0: no clipping
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)  # None: before the first and after the last step only
    load_best_model_at_end: bool = False  # the evaluated step with the best metric is merged, not the last one
    metric_for_best_model: Literal["loss", "token_accuracy"] = "loss"
    save_steps: int = Field(100, ge=1)
    save_total_limit: int = Field(2, ge=2)


class RunBlock(Block):
    """Where the run lives and what it leaves."""

    name: str = Field(pattern=_RUN_NAME.pattern, max_length=100)  # one path component
    output_dir: str = "runs"
    report_to: Names = ()
    merge: bool | None = None  # None: yes with LoRA; soft prompts cannot be merged
    merge_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"  # auto: the trained type, 16-bit for fp32
    max_shard_size_bytes: int = Field(4_000_000_000, ge=1)
    process_group_timeout_seconds: int = Field(1800, ge=10)


class Recipe(Block):
    """Everything a run depends on besides the accelerate YAML (processes) and the DeepSpeed JSON (sharding)."""

    model: ModelBlock
    data: DataBlock
    adapter: Annotated[AdapterBlock, Field(discriminator="type"), BeforeValidator(_typed)] = LoraBlock()
    train: TrainBlock = TrainBlock()
    run: RunBlock

    @model_validator(mode="after")
    def _agree(self) -> "Recipe":
        virtual = self.adapter.num_virtual_tokens
        if self.data.max_length + virtual > self.train.max_tokens_per_micro_batch:
            also = f" and adapter.num_virtual_tokens = {virtual} are" if virtual else " is"
            raise ValueError(
                f"data.max_length = {self.data.max_length}{also} more than train.max_tokens_per_micro_batch = "
                f"{self.train.max_tokens_per_micro_batch}, so the longest sample would fit no micro-batch; "
                "raise the second or lower the first"
            )
        blocks: list[DataBlock | Source] = [self.data, *self.data.train, *self.data.evaluation]
        for block in blocks:  # a source's own goes before the block's
            if block.format not in (None, "auto") and block.prompt_template is not None:
                name = block.path if isinstance(block, Source) else "data"
                both = f"a format ({block.format}) and a prompt_template ({block.prompt_template})"
                raise ValueError(f"{name} has both {both}; keep one")
        if any(source.weight != 1 for source in self.data.evaluation):
            raise ValueError("data.evaluation has a weight, but every held-out row counts once; leave it out")
        if self.data.evaluation and self.data.test_size:
            raise ValueError("data.evaluation and data.test_size are both set; keep one")
        if self.train.warmup_steps and self.train.warmup_ratio:
            raise ValueError("train.warmup_steps and train.warmup_ratio are both set; keep one")
        if self.train.load_best_model_at_end and self.train.eval_steps is None:
            raise ValueError("train.load_best_model_at_end needs evaluations to choose from; set train.eval_steps")
        self._check_adapter()
        return self

    def _check_adapter(self) -> None:
        adapter = self.adapter
        if isinstance(adapter, LoraBlock):
            if adapter.target_modules is not None and not adapter.target_modules:
                raise ValueError("adapter.target_modules is empty; name modules such as q_proj, or leave it out")
            return
        if self.run.merge:
            raise ValueError(
                f"run.merge is true, but the soft prompts of {adapter.type} are no weights of the base that could be "
                "merged; leave it out, and serve the base with the adapter"
            )
        if isinstance(adapter, PrefixTuningBlock) and self.train.gradient_checkpointing:
            raise ValueError(
                "train.gradient_checkpointing throws the keys and values away that prefix_tuning is made of; set it to "
                "false, or take another adapter.type"
            )
        if isinstance(adapter, PrefixTuningBlock) and adapter.encoder_hidden_size and not adapter.prefix_projection:
            raise ValueError("adapter.encoder_hidden_size belongs to a projection; set adapter.prefix_projection: true")
        if isinstance(adapter, PTuningBlock):
            is_lstm = adapter.encoder_reparameterization_type == "LSTM"
            if not is_lstm and (adapter.encoder_num_layers != 2 or adapter.encoder_dropout):
                raise ValueError(
                    "adapter.encoder_num_layers and encoder_dropout are the LSTM encoder's (an MLP always has two "
                    "layers and no dropout); set adapter.encoder_reparameterization_type: LSTM"
                )
        if isinstance(adapter, PromptTuningBlock):
            is_of_text = adapter.prompt_tuning_init == "TEXT"
            if is_of_text != bool(adapter.prompt_tuning_init_text):
                raise ValueError("adapter.prompt_tuning_init: TEXT and prompt_tuning_init_text go together; set both")

    @property
    def merges(self) -> bool:
        """Whether the run ends with merged weights."""
        return isinstance(self.adapter, LoraBlock) and self.run.merge is not False

    @property
    def run_directory(self) -> Path:
        """`<output_dir>/<name>`."""
        return Path(self.run.output_dir) / self.run.name


class _Yaml(yaml.SafeLoader):
    """YAML with `2e-4` as a number (YAML 1.2 and JSON agree, YAML 1.1 reads a string) and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


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
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(path, error)) from None


def parse_command_line(arguments: Sequence[str]) -> Recipe:
    """`[RECIPE.yaml] [block.key=value ...]` -> Recipe; without a recipe, the embedded default."""
    paths = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    if len(paths) > 1:
        raise ConfigError(f"One recipe at a time, but {' and '.join(paths)} were given; overrides are block.key=value.")
    return load_recipe(Path(paths[0]) if paths else DEFAULT_RECIPE, overrides)


def intended_run_directory(arguments: Sequence[str]) -> Path:
    """Where the run would live, for telling that a recipe was refused: good for recipes that do not load, too."""
    paths = [Path(a) for a in arguments if "=" not in a]
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
    return Path(str(block.get("output_dir", "runs"))) / (name if _RUN_NAME.fullmatch(name) else path.stem)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
        elsewhere = [f"{block}.{key}" for block in Recipe.model_fields if key in _owner((block,)).model_fields]
        near = elsewhere or difflib.get_close_matches(where, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{path}: {where} is not a recipe key; {hint}The valid ones here are {_choices(owner)}."
    if first["type"] == "missing":
        return f"{path}: {where} is required and not given."
    if first["type"] == "value_error":
        return f"{path}: {where + ': ' if where else ''}{first['ctx']['error']}."
    if first["type"] == "union_tag_invalid":
        return f"{path}: {where}.type = {first['ctx']['tag']!r} is not valid; the valid ones are {', '.join(ADAPTERS)}."
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{path}: {where} = {first['input']!r} is not valid: {reason}."


def _where(location: Sequence[int | str]) -> str:
    """`data.train[0].path`; the kind of an adapter, which pydantic puts between, is no key."""
    parts = [
        part
        for place, part in enumerate(location)
        if not (place == 1 and location[0] == "adapter" and part in ADAPTERS)
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
