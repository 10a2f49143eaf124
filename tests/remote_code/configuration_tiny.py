"""The configuration of the tests' remote-code model."""

from typing import Any

from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "cairn_tiny"  # which transformers does not know

    def __init__(
        self,
        vocab_size: int = 600,
        hidden_size: int = 32,
        intermediate_size: int = 48,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        initializer_range: float = 0.2,
        has_table: bool = False,
        **given: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.initializer_range = initializer_range
        self.has_table = has_table
        given.setdefault("tie_word_embeddings", False)
        super().__init__(**given)
