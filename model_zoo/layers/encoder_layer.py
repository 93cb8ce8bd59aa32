"""A transformer encoder layer over masked sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "gelu"]
NormPosition = Literal["post", "pre"]


class EncoderLayer(nn.Module):
    """Multi-head self-attention and a two-layer feed-forward net, each with dropout, residual and layer norm.

    Parameters have the names, shapes and first values of ``torch.nn.TransformerEncoderLayer``, so state dicts pass from
    one to the other, and FuxiCTR's reset meets the same exact ``nn.Linear``s (``linear1``, ``linear2``) in both. Unlike
    torch's, a row or a causal prefix without a real token is no nan: such tokens attend to nothing, which is zeros.

    Args:
        width: w, of tokens and of the answer.
        num_heads: attention heads; must divide ``width``.
        inner: hidden width of the feed-forward net.
        dropout: on what attention and the feed-forward net add to the residual.
        attention_dropout: on attention weights; None = ``dropout``.
        inner_dropout: on the feed-forward net's hidden units; None = ``dropout``.
        activation: of those hidden units (``gelu`` is the exact one).
        norm: ``post`` normalises after each residual sum, ``pre`` before attention and feed-forward net.
        eps: of the layer norms.

    Raises:
        ValueError: ``num_heads`` does not divide ``width``.

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762), section 3; pre-norm: Xiong et al. (2002.04745).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        inner: int,
        dropout: float = 0.0,
        *,
        attention_dropout: float | None = None,
        inner_dropout: float | None = None,
        activation: Activation = "relu",
        norm: NormPosition = "post",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide the width of the tokens ({width})")
        self.norm_position = norm
        functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
        self.activation = functions[activation]
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)  # holds parameters, is not called
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout = nn.Dropout(dropout if inner_dropout is None else inner_dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor, causal: bool = False) -> Tensor:
        """Encode.

        Args:
            tokens: ``[B, T, w]``; finite at padding positions too.
            mask: ``[B, T]`` bool, True = real. No token attends to padding.
            causal: tokens attend to themselves and to columns before theirs only.

        Returns:
            ``[B, T, w]``. Padding positions hold finite answers to their own tokens; the caller masks what it reads.
        """
        if tokens.numel() == 0:
            return tokens
        allowed = mask[:, None, None, :]  # [B, 1, 1, T], of keys
        if causal:
            allowed = allowed & mask.new_ones(tokens.shape[1], tokens.shape[1]).tril()  # [B, 1, T, T]
        if self.norm_position == "pre":
            tokens = tokens + self._attend(self.norm1(tokens), allowed)
            return tokens + self._feed_forward(self.norm2(tokens))
        tokens = self.norm1(tokens + self._attend(tokens, allowed))
        return self.norm2(tokens + self._feed_forward(tokens))

    def _attend(self, tokens: Tensor, allowed: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        projected = F.linear(tokens, self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
        query, key, value = projected.view(batch, length, 3, self.self_attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        # a softmax over nothing is nan in some versions of torch: let such tokens attend to all and drop the answer
        some = allowed.any(-1, keepdim=True)
        rate = self.attention_dropout if self.training else 0.0
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~some, dropout_p=rate) * some
        return self.dropout1(self.self_attn.out_proj(answer.transpose(1, 2).reshape(batch, length, width)))

    def _feed_forward(self, tokens: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(tokens)))))
