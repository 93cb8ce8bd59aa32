"""Item or context embeddings that start from, or stay, pretrained vectors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class PretrainedVectors(nn.Module):
    """An embedding table built on pretrained vectors, with FuxiCTR's parameter names and ``pretrain_usage`` meanings.

    ``init``: the vectors are the embedding, projected if their width differs. ``sum`` / ``concat``: they are added to, or
    put beside (then projected), a trained id embedding.

    Args:
        vectors: ``[V, p]`` one row per id; rows of unknown ids and of id 0 are zero.
        known: ``[V]`` bool, ids that have a vector.
        embedding_dim: width of the result.
        usage: see above.
        freeze: the vectors are not trained.
        std: standard deviation of the id embedding and, unless frozen, of the rows of unknown ids.
    """

    def __init__(
        self,
        vectors: Tensor,
        known: Tensor,
        embedding_dim: int,
        usage: Literal["init", "sum", "concat"] = "init",
        freeze: bool = True,
        std: float = 1e-4,
    ) -> None:
        super().__init__()
        vocab_size, width = vectors.shape
        self.usage = usage
        self.std = std
        table = vectors.clone()
        if not freeze:
            missing = ~known
            missing[0] = False
            table[missing] = torch.randn(int(missing.sum()), width) * std
        self.pretrain_embedding = nn.Embedding.from_pretrained(table, freeze=freeze, padding_idx=0)
        self.id_embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0) if usage != "init" else None
        self.proj: nn.Linear | None = None
        if usage == "concat":
            self.proj = nn.Linear(width + embedding_dim, embedding_dim, bias=False)
        elif width != embedding_dim:
            self.proj = nn.Linear(width, embedding_dim, bias=False)

    def init_weights(self) -> None:
        """FuxiCTR's reset hook: only the id embedding is drawn anew."""
        if self.id_embedding is not None:
            nn.init.normal_(self.id_embedding.weight, std=self.std)
            with torch.no_grad():
                self.id_embedding.weight[0] = 0.0

    reset_custom_params = init_weights

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` ids to ``[..., embedding_dim]``."""
        vectors = self.pretrain_embedding(ids)
        if self.id_embedding is None:
            return self.proj(vectors) if self.proj is not None else vectors
        if self.usage == "concat":
            assert self.proj is not None
            return self.proj(torch.cat([vectors, self.id_embedding(ids)], dim=-1))
        return (self.proj(vectors) if self.proj is not None else vectors) + self.id_embedding(ids)
