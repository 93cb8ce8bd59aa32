"""FinalMLP's head: two MLPs over the same input, fused by a bilinear form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_zoo.compat import FeatureEmbedding, MLP_Block
from model_zoo.layers.heads import HeadInputs, HeadShape

Activations = str | list[str]
Rates = float | list[float]


class FinalMLPHead(nn.Module):
    """``w_x u + w_y v + sum_h u_h^T W_h v_h`` of two MLPs u, v over ``z = [context ; target ; interest]``.

    With ``use_fs`` each MLP reads z gated feature by feature by context features of its own. Without a context feature for
    either, gates would be constants that the MLPs' first layers hold already: no gates are built. LongCTR builds them
    always and never calls them, which ``longctr_compat`` reproduces.

    Args:
        shape: widths.
        mlp1_hidden_units: hidden widths of the first MLP; None = [64, 64, 64].
        mlp1_hidden_activations: its activation.
        mlp1_dropout: its dropout.
        mlp1_batch_norm: its batch normalisation.
        mlp2_hidden_units: the same for the second.
        mlp2_hidden_activations: the same for the second.
        mlp2_dropout: the same for the second.
        mlp2_batch_norm: the same for the second.
        use_fs: gate features.
        fs_hidden_units: hidden widths of the gates; None = [64].
        fs1_context: context features that gate the first MLP's input.
        fs2_context: those of the second.
        num_heads: blocks of the bilinear form; must divide both MLPs' last widths.

    Raises:
        ValueError: an MLP without a hidden layer, heads that do not divide, or a gating feature that is not a context one.

    Source: Mao et al., FinalMLP, AAAI 2023 (arXiv 2304.00902), eq. 4-8.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        mlp1_hidden_units: list[int] | None = None,
        mlp1_hidden_activations: Activations = "ReLU",
        mlp1_dropout: Rates = 0.0,
        mlp1_batch_norm: bool = False,
        mlp2_hidden_units: list[int] | None = None,
        mlp2_hidden_activations: Activations = "ReLU",
        mlp2_dropout: Rates = 0.0,
        mlp2_batch_norm: bool = False,
        use_fs: bool = True,
        fs_hidden_units: list[int] | None = None,
        fs1_context: list[str] | None = None,
        fs2_context: list[str] | None = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        units1 = [64, 64, 64] if mlp1_hidden_units is None else list(mlp1_hidden_units)
        units2 = [64, 64, 64] if mlp2_hidden_units is None else list(mlp2_hidden_units)
        for key, units in (("mlp1_hidden_units", units1), ("mlp2_hidden_units", units2)):
            if not units:
                raise ValueError(f"{key} must name at least one layer, not {units}")
            if num_heads < 1 or units[-1] % num_heads:
                raise ValueError(f"num_heads ({num_heads}) must divide the last of {key} ({units[-1]})")

        def stream(units: list[int], activations: Activations, dropout: Rates, batch_norm: bool) -> MLP_Block:
            return MLP_Block(
                input_dim=shape.width,
                hidden_units=units,
                hidden_activations=activations,
                dropout_rates=dropout,
                batch_norm=batch_norm,
            )

        self.mlp1 = stream(units1, mlp1_hidden_activations, mlp1_dropout, mlp1_batch_norm)
        self.mlp2 = stream(units2, mlp2_hidden_activations, mlp2_dropout, mlp2_batch_norm)
        self.fs_module: FeatureSelection | None = None
        if use_fs and (fs1_context or fs2_context or shape.longctr_compat):
            hidden = [64] if fs_hidden_units is None else list(fs_hidden_units)
            self.fs_module = FeatureSelection(shape, hidden, fs1_context or [], fs2_context or [])
        self.calls_fs = self.fs_module is not None and not shape.longctr_compat
        self.fusion_module = BilinearFusion(units1[-1], units2[-1], num_heads)

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Logits ``[B, 1]``."""
        first = second = inputs.joined()
        if self.calls_fs:
            assert self.fs_module is not None
            first, second = self.fs_module(inputs.columns, first)
        return self.fusion_module(self.mlp1(first), self.mlp2(second))


class FeatureSelection(nn.Module):
    """Two gates ``2 sigmoid(MLP(e))`` in (0, 2) over z's features, e the embedding of context features, or a learned one.

    Args:
        shape: widths.
        hidden_units: hidden widths of both gates.
        context1: context features of the first gate; none: a learned vector.
        context2: those of the second.

    Source: FinalMLP (arXiv 2304.00902), eq. 4-5.
    """

    def __init__(self, shape: HeadShape, hidden_units: list[int], context1: list[str], context2: list[str]) -> None:
        super().__init__()
        features = shape.feature_map.features
        for number, context in ((1, context1), (2, context2)):
            width = shape.embedding_dim
            if context:
                for name in context:
                    if name not in features or features[name]["type"] == "meta" or features[name].get("source") == "item":
                        raise ValueError(f"fs{number}_context: '{name}' is not a context feature of the data set")
                embedding = FeatureEmbedding(
                    shape.feature_map, shape.embedding_dim, required_feature_columns=context, use_pretrain=False
                )
                self.add_module(f"fs{number}_ctx_emb", embedding)
                width = sum(features[name].get("embedding_dim", shape.embedding_dim) for name in context)
            else:
                self.register_parameter(f"fs{number}_ctx_bias", nn.Parameter(torch.zeros(1, shape.embedding_dim)))
            gate = MLP_Block(
                input_dim=width,
                output_dim=shape.width,
                hidden_units=hidden_units,
                hidden_activations="ReLU",
                output_activation="Sigmoid",
            )
            self.add_module(f"fs{number}_gate", gate)
        self.contexts = (context1, context2)

    def forward(self, columns: dict[str, Tensor], joined: Tensor) -> tuple[Tensor, Tensor]:
        """z ``[B, width]`` under either gate; ``columns`` are the raw context columns."""
        return self._gated(1, columns, joined), self._gated(2, columns, joined)

    def _gated(self, number: int, columns: dict[str, Tensor], joined: Tensor) -> Tensor:
        names = self.contexts[number - 1]
        if names:
            own = {name: columns[name] for name in names}
            embedded = self.get_submodule(f"fs{number}_ctx_emb")(own, flatten_emb=True)
        else:
            embedded = self.get_parameter(f"fs{number}_ctx_bias")
        return joined * (2 * self.get_submodule(f"fs{number}_gate")(embedded))


class BilinearFusion(nn.Module):
    """``w_x u + b_x + w_y v + b_y + sum_h u_h^T W_h v_h``, u and v cut into ``num_heads`` equal parts.

    Source: FinalMLP (arXiv 2304.00902), eq. 6-8.
    """

    def __init__(self, width1: int, width2: int, num_heads: int) -> None:
        super().__init__()
        self.shape = (num_heads, width1 // num_heads, width2 // num_heads)
        self.w_x = nn.Linear(width1, 1)
        self.w_y = nn.Linear(width2, 1)
        self.w_xy = nn.Parameter(torch.empty(width1 * width2 // num_heads, 1))
        nn.init.xavier_normal_(self.w_xy)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits ``[B, 1]`` of ``first [B, width1]`` and ``second [B, width2]``."""
        mapped = torch.einsum("bhx,hxy->bhy", first.view(-1, *self.shape[:2]), self.w_xy.view(self.shape))
        product = (mapped.flatten(1) * second).sum(1, keepdim=True)
        return self.w_x(first) + self.w_y(second) + product
