"""The frozen `Recipe`: every key that a user can set, every default, and what cannot go together."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from launch.attention import offered
from launch.slurm_options import SlurmOptions

TINY_MODEL_NAME = "tiny-qwen2"  # not on any hub: built on the spot
SHARD_BYTES = 4_000_000_000  # of a merged model
RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # one path component
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML has lists, a frozen recipe has tuples


def _paired(value: object) -> object:
    """`{q_proj: 16}` as pairs, which a frozen recipe can hold."""
    if isinstance(value, tuple):
        return value
    numbers = list(value.values()) if isinstance(value, dict) else [None]
    if not all(type(number) is int and number >= 1 for number in numbers):
        raise ValueError(f"it maps modules to whole numbers from 1, as in {{q_proj: 16}}, but this is {value!r}")
    assert isinstance(value, dict)
    return tuple(value.items())


Pattern = Annotated[tuple[tuple[str, int], ...], BeforeValidator(_paired), PlainSerializer(dict)]
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class Block(BaseModel):
    """A block of the recipe: unknown keys are errors, values keep their type, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelBlock(Block):
    """The base model: a hub id, a local directory, or `tiny-qwen2`, which is built on the spot."""

    name_or_path: str = Field(min_length=1)  # with a factory: a .pth file, the state dict of what it builds
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: Annotated[Literal["sdpa", "eager"], BeforeValidator(offered)] = "sdpa"
    factory: str | None = Field(None, pattern=r"\.py:[A-Za-z_]\w*$")  # FILE.py:FUNCTION, which builds your own module
    tokenizer: str | None = None  # a hub id or a directory, for a factory; other models bring theirs
    load_in_4bit: bool = False  # by bitsandbytes: all linear layers but the head; merged in 16 bits all the same
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False  # the quantisation's constants are quantised, too
    # Tokens for the tokenizer; those it does not have are added, and get rows in the embeddings and the head.
    extra_special_tokens: Names = ()
    eos_token: str | None = Field(None, min_length=1)  # None: the tokenizer's own
    pad_token: str | None = Field(None, min_length=1)  # None: the tokenizer's own
    hash_weights: bool = False  # a resumed run compares every byte of the base's files, not parts of them

    @model_validator(mode="after")
    def _agree(self) -> "ModelBlock":
        if (self.factory is None) != (self.tokenizer is None):
            raise ValueError(
                "factory and tokenizer go together: a .pth file has no tokenizer, and other models bring theirs"
            )
        for key in ("load_in_4bit", "extra_special_tokens", "eos_token", "pad_token"):
            if self.factory is not None and getattr(self, key):
                raise ValueError(f"{key} needs a model of transformers; with a factory leave it out")
        if not self.load_in_4bit and (self.bnb_4bit_quant_type != "nf4" or self.bnb_4bit_use_double_quant):
            raise ValueError(
                "bnb_4bit_quant_type and bnb_4bit_use_double_quant say how the base is quantised, but it is not; set "
                "load_in_4bit: true, or leave them out"
            )
        tokens = self.extra_special_tokens
        if "" in tokens or len(set(tokens)) < len(tokens):
            raise ValueError(f"extra_special_tokens = {list(tokens)} has an empty token, or one twice; list each once")
        return self

    @property
    def tokenizer_name_or_path(self) -> str:
        """Where the tokenizer is loaded from."""
        return self.tokenizer or self.name_or_path

    @property
    def without_tokens(self) -> "ModelBlock":
        """The same base with its tokenizer as it is."""
        return self.model_copy(update={"extra_special_tokens": (), "eos_token": None, "pad_token": None})


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
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Pattern = ()  # r of the targets whose path ends with the key, a regular expression
    alpha_pattern: Pattern = ()  # and lora_alpha
    # Token ids whose embeddings are trained, and their rows of a tied head; added: those that model.* tokens added.
    trainable_token_indices: TokenIds | Literal["added"] = ()
    init_from: str | None = Field(None, min_length=1)  # a PEFT LoRA to start from: a directory or a hub id

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
    init_from: str | None = Field(None, min_length=1)  # PEFT's prompt tuning to start from: a directory or a hub id


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
SoftPrompt = PTuningBlock | PrefixTuningBlock | PromptTuningBlock
AdapterBlock = LoraBlock | SoftPrompt


# Of PEFT before 0.3, in adapter_config.json as well, and what takes their place.
OLD_LORA_KEYS = {
    "enable_lora": "list the modules that LoRA adapts, as in target_modules: [q_proj, v_proj]",
    "merge_weights": "leave it out, for run.merge decides whether the run ends with merged weights",
}


def _typed(value: object) -> object:
    if not isinstance(value, dict):
        return value
    for key, instead in OLD_LORA_KEYS.items():
        if key in value:
            raise ValueError(f"{key} is a key of PEFT before 0.3; {instead}")
    if "init_from" in value and value.get("type") in ("p_tuning", "prefix_tuning"):
        raise ValueError(
            f"init_from cannot go with {value['type']}: PEFT keeps what the encoder made, not the encoder; leave it out"
        )
    return {"type": "lora", **value}


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
    loraplus_lr_ratio: float | None = Field(None, ge=1)  # LoRA+: what PEFT takes for B learns so many times faster
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
    save_seconds: float | None = Field(None, gt=0)  # as well as save_steps; None: by Young's rule, at most 240
    save_total_limit: int = Field(2, ge=2)
    max_bad_steps: int = Field(25, ge=1)  # steps in a row that overflow or are not a number, before the run stops


class RunBlock(Block):
    """Where the run lives and what it leaves."""

    name: str = Field(pattern=RUN_NAME.pattern, max_length=100)  # one path component
    output_dir: str = "runs"
    report_to: Names = ()
    group_readable: bool = False  # what the run leaves is otherwise its user's alone (0700, 0600), not 0750 and 0640
    merge: bool | None = None  # None: yes with LoRA; soft prompts cannot be merged
    merge_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"  # auto: the trained type, 16-bit for fp32
    max_shard_size_bytes: int = Field(SHARD_BYTES, ge=1)
    max_failed_saves: int = Field(3, ge=1)  # in a row, before the run stops
    hang_seconds: float = Field(900.0, gt=0)  # without a micro-batch, before a rank ends itself
    grace_seconds: float | None = Field(None, gt=0)  # SIGTERM to SIGKILL; None: as long as torch's launcher waits
    process_group_timeout_seconds: int = Field(1800, ge=10)
    max_requeues: int = Field(200, ge=0)  # of a Slurm job
    allow_change: Names = ()  # keys that may differ from the checkpoint's though the result depends on them


class Recipe(Block):
    """Everything a run depends on besides the accelerate YAML (processes) and the DeepSpeed JSON (sharding)."""

    model: ModelBlock
    data: DataBlock
    adapter: Annotated[AdapterBlock, Field(discriminator="type"), BeforeValidator(_typed)] = LoraBlock()
    train: TrainBlock = TrainBlock()
    run: RunBlock
    slurm: SlurmOptions = ()

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
        self._check_base_and_adapter()
        if isinstance(self.adapter, LoraBlock):
            self._check_lora(self.adapter)
        else:
            self._check_soft_prompt(self.adapter)
        return self

    def _check_base_and_adapter(self) -> None:
        adapter = self.adapter
        if isinstance(adapter, LoraBlock) and adapter.use_dora and self.model.load_in_4bit and self.merges:
            raise ValueError(
                "adapter.use_dora learns magnitudes of the weights as they are in 4 bits, so that it cannot be merged "
                "into those in 16 bits; set run.merge: false, adapter.use_dora: false, or model.load_in_4bit: false"
            )
        if not isinstance(adapter, LoraBlock) and self.model.extra_special_tokens:
            raise ValueError(
                f"model.extra_special_tokens adds tokens whose rows adapter.type = {adapter.type} does not train; take "
                "lora, or leave them out"
            )
        if self.model.factory is not None:
            if not isinstance(adapter, LoraBlock):
                raise ValueError(
                    f"adapter.type = {adapter.type} needs a model of transformers; with model.factory use lora"
                )
            if adapter.target_modules in (None, "all-linear"):
                raise ValueError(
                    "adapter.target_modules must name the layers of a model.factory, such as [query_key_value]: which "
                    "of them is the output head, and no target, only you know"
                )

    @staticmethod
    def _check_lora(adapter: LoraBlock) -> None:
        if adapter.target_modules is not None and not adapter.target_modules:
            raise ValueError("adapter.target_modules is empty; name modules such as q_proj, or leave it out")
        ids = adapter.trainable_token_indices
        if ids == "added" and adapter.init_from is not None:
            raise ValueError(
                "adapter.trainable_token_indices = added cannot be compared with adapter.init_from; give the ids "
                "that its adapter_config.json has"
            )
        if not isinstance(ids, str) and len(set(ids)) < len(ids):
            twice = next(token_id for token_id in ids if ids.count(token_id) > 1)
            raise ValueError(f"adapter.trainable_token_indices has {twice} twice; keep one")

    def _check_soft_prompt(self, adapter: SoftPrompt) -> None:
        if self.train.loraplus_lr_ratio is not None:
            raise ValueError(
                f"train.loraplus_lr_ratio is for the B matrices of LoRA, and {adapter.type} has none; leave it out"
            )
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
            if is_of_text and adapter.init_from:
                raise ValueError("adapter.prompt_tuning_init: TEXT and adapter.init_from are two beginnings; keep one")

    @property
    def merges(self) -> bool:
        """Whether the run ends with merged weights."""
        return isinstance(self.adapter, LoraBlock) and self.run.merge is not False

    @property
    def run_directory(self) -> Path:
        """`<output_dir>/<name>`."""
        return Path(self.run.output_dir) / self.run.name
