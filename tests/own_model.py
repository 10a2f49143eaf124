"""A user's own model in the manner of ChatGLM: one fused query_key_value, rotary positions, a forward of its own."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 600, 32, 2, 4
HEAD_SIZE = HIDDEN_SIZE // NUM_HEADS


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x [batch, heads, seq, head], angles [batch, seq, head / 2]."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN_SIZE)
        self.query_key_value = nn.Linear(HIDDEN_SIZE, 3 * HIDDEN_SIZE)
        self.dense = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN_SIZE)
        self.dense_h_to_4h = nn.Linear(HIDDEN_SIZE, 2 * HIDDEN_SIZE)
        self.dense_4h_to_h = nn.Linear(2 * HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = hidden.shape
        fused = self.query_key_value(self.input_layernorm(hidden)).view(batch, seq, 3, NUM_HEADS, HEAD_SIZE)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, angles), rotate(key, angles)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=sees[:, None])
        hidden = hidden + self.dense(attended.transpose(1, 2).reshape(batch, seq, HIDDEN_SIZE))
        return hidden + self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(self.post_attention_layernorm(hidden))))


class OwnModel(nn.Module):
    """Returns (logits, hidden states); the head is the embedding, a third of the weights here."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.final_layernorm = nn.LayerNorm(HIDDEN_SIZE)
        self.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        self.lm_head.weight = self.word_embeddings.weight
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, HEAD_SIZE, 2).float() / HEAD_SIZE))

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None] * self.inv_freq
        hidden = self.word_embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, angles, sees)
        hidden_states: torch.Tensor = self.final_layernorm(hidden)
        return hidden_states

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        sees = (positions[:, None] >= positions)[None]  # [1, seq, seq]
        if attention_mask is not None:
            sees = sees & attention_mask.bool()[:, None] | torch.eye(len(positions), dtype=torch.bool)
        hidden = self.hidden_states(input_ids, positions.expand_as(input_ids), sees)
        return self.lm_head(hidden), hidden


class PackableModel(OwnModel):
    """Keeps packed samples apart, computes logits at chosen columns only, and returns an object."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = columns.expand_as(input_ids) if position_ids is None else position_ids
        sample = (positions == 0).cumsum(-1)  # [batch, seq] which sample a token belongs to
        sees = (sample[:, :, None] == sample[:, None]) & (columns[:, None] >= columns)
        hidden = self.hidden_states(input_ids, positions, sees)
        if logits_to_keep is not None:
            hidden = hidden[:, logits_to_keep]
        return SimpleNamespace(logits=functional.linear(hidden, self.word_embeddings.weight))


class DeadEndModel(OwnModel):
    """Has a module that no logit depends on: what it computes is thrown away, or taken times zero."""

    def __init__(self, *, is_thrown_away: bool) -> None:
        super().__init__()
        self.dead_end = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.is_thrown_away = is_thrown_away

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        hidden = super().hidden_states(input_ids, position_ids, sees)
        wasted = self.dead_end(hidden)
        return hidden if self.is_thrown_away else hidden + 0 * wasted


def build() -> nn.Module:
    return OwnModel()


def build_packable() -> nn.Module:
    return PackableModel()


def build_with_a_dead_end() -> nn.Module:
    return DeadEndModel(is_thrown_away=False)


def build_with_an_unused_module() -> nn.Module:
    return DeadEndModel(is_thrown_away=True)


def build_with_a_table() -> nn.Module:
    model = OwnModel()
    model.register_buffer("scale", torch.tensor(0.1), persistent=False)
    return model


def build_what_fails() -> nn.Module:
    raise KeyError("hidden_size")


def build_no_module() -> nn.Module:
    return {"weights": 1}  # type: ignore[return-value]
