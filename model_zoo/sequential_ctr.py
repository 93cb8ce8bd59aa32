"""The base of every model: batch -> item vectors -> sequence block -> head, written once."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.batch import MEAN_ROWS, AnyBatch, Batch, ItemFeatures
from model_zoo.checkpoint import read_weights, write_weights
from model_zoo.compat import FeatureMap
from model_zoo.embedding import Pretrained, build_embedding
from model_zoo.errors import ConfigError, DataError
from model_zoo.layers.blocks import call_block
from model_zoo.layers.compiled import compile_dense
from model_zoo.layers.dropout import use_fast_dropout
from model_zoo.layers.heads import HeadInputs, HeadShape, Loss
from model_zoo.layers.random_state import isolated_rng
from model_zoo.layers.sequence import Sequence, SharedSequence, distinct_items
from model_zoo.layers.timed_sequence import timed
from model_zoo.layers.windows import CATEGORY
from model_zoo.scoring import score
from model_zoo.training import TrainingLoop

if TYPE_CHECKING:
    from model_zoo.registry import Backbone, Method


class SequentialCTR(TrainingLoop):
    """A FuxiCTR model ``head(context, target, block(target, history))`` over any sequence block.

    Subclasses are made by ``registry.compose``, which sets ``backbone`` and ``method``; their configuration keys are this
    constructor's, the block's, the head's and the method's keyword-only parameters.

    Args:
        feature_map: FuxiCTR's; features with ``source: item`` describe items.
        model_id: name of the checkpoint file.
        gpu: CUDA device index, -1 = CPU.
        item_features: the item table; needed for batches of item indices, not for LongCTR's tuples.
        pretrained: feature name to ``(vectors [V, p], known [V])`` for features with ``pretrained_emb``.
        embedding_dim: width of one feature's embedding.
        learning_rate: of the optimizer.
        accumulation_steps: batches per optimizer step.
        embedding_regularizer: L2 strength, or FuxiCTR's ``l1(x)``, ``l2(x)``, ``l1_l2(x,y)``.
        net_regularizer: the same for all other parameters.
        optimizer: name in ``torch.optim``.
        loss: ``binary_crossentropy`` or a loss of ``torch.nn.functional``.
        block_scope: what one expert is a copy of: the ``full`` interest module, or its ``long`` branch.
        longctr_compat: reproduce LongCTR on FuxiCTR 2.3.2, quirks included.
        sparse_embedding_updates: another algorithm than Adam, for tables far larger than a batch: of the feature
            embedding's tables a step updates only the rows that its batches touch. Moments of the other rows do not
            decay, and the regulariser sees a row only in batches that hold it. Needs optimizer adam.
        precision: ``bfloat16`` runs block and head under autocast; embedding, routing, codebooks, predictions, loss and
            weights stay float32.
        compile: hand the head's MLPs and cross networks to ``torch.compile``; the first batches take longer.
    """

    backbone: ClassVar[Backbone]
    method: ClassVar[Method | None] = None
    score = score
    #: the item feature that the block reads as each item's category
    category_feature: str | None = None

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str | None = None,
        gpu: int = -1,
        item_features: ItemFeatures | None = None,
        pretrained: Pretrained | None = None,
        *,
        embedding_dim: int = 10,
        learning_rate: float = 1e-3,
        accumulation_steps: int = 1,
        embedding_regularizer: float | str | None = None,
        net_regularizer: float | str | None = None,
        optimizer: str = "adam",
        loss: str = "binary_crossentropy",
        block_scope: Literal["full", "long"] = "full",
        longctr_compat: bool = False,
        sparse_embedding_updates: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        **params: Any,
    ) -> None:
        if longctr_compat and self.method is not None:
            raise ValueError(f"longctr_compat: LongCTR has no {type(self).__name__}; set it for a plain backbone only")
        super().__init__(
            feature_map,
            model_id=model_id or type(self).__name__,
            gpu=gpu,
            embedding_regularizer=embedding_regularizer,
            net_regularizer=net_regularizer,
            learning_rate=learning_rate,
            accumulation_steps=accumulation_steps,
            longctr_compat=longctr_compat,
            sparse_embedding_updates=sparse_embedding_updates,
            **params,
        )
        shared = {"embedding_dim": embedding_dim, "block_scope": block_scope, "longctr_compat": longctr_compat}
        self.config = {**shared, **self.backbone.configuration(self.method, {**params, **shared})}
        self.precision = precision
        self.item_names = [n for n, spec in feature_map.features.items() if spec.get("source") == "item"]
        if not self.item_names:
            raise ConfigError("feature_cols: no feature has `source: item`; mark the columns of item_info.parquet so")
        self.item_dim = sum(self._width(feature_map.features[name], embedding_dim) for name in self.item_names)
        self.embedding_layer = build_embedding(feature_map, embedding_dim, pretrained or {})
        self.block = self._build_block({**params, "longctr_compat": longctr_compat}, block_scope)
        shape = HeadShape(
            context_dim=feature_map.sum_emb_out_dim() - self.item_dim,
            item_dim=self.item_dim,
            interest_dim=int(self.block.out_dim),  # type: ignore[arg-type]
            feature_map=feature_map,
            embedding_dim=embedding_dim,
            output_activation=self.output_activation,
            longctr_compat=longctr_compat,
        )
        self.head = self.backbone.make_head(shape, params)
        self.item_features = item_features
        if not longctr_compat:
            use_fast_dropout(self)
        self.compile(optimizer, loss, learning_rate)
        self.reset_parameters()
        self.model_to_device()
        if compile:
            compile_dense(self.head, self.device)

    @staticmethod
    def _width(spec: dict[str, Any], embedding_dim: int) -> int:
        return spec.get("emb_output_dim", spec.get("embedding_dim", embedding_dim))

    def _build_block(self, params: dict[str, Any], scope: str) -> nn.Module:
        """The backbone's block, inside the method's layer if there is a method."""
        make, method = self.backbone.factory(self.item_dim, params), self.method
        if method is None:
            return make()
        if scope == "full":
            return method.wrap(make, self.item_dim, params)
        return make(lambda long_branch: method.wrap(long_branch, self.item_dim, params))

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, inputs: AnyBatch) -> dict[str, Any]:
        """Click probabilities.

        Args:
            inputs: a `Batch` of item indices, or LongCTR's ``(batch_dict, item_dict, mask)``.

        Returns:
            ``y_pred`` ``[B, 1]`` and ``losses``, the weighted auxiliary losses of block and head.
        """
        context, target, sequence = self._read(inputs, share=not self.training and not torch.is_grad_enabled())
        embedded = self.embedding_layer(context, flatten_emb=True) if context else None
        losses: list[Loss] = []
        with torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext():
            interest = call_block(self.block, target, sequence, losses)
            logits = self.head(HeadInputs(embedded, target, interest, context, losses))
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        return {"y_pred": self.output_activation(logits), "losses": losses}

    @overload
    def _read(self, inputs: AnyBatch, share: Literal[False] = False) -> tuple[dict[str, Tensor], Tensor, Sequence]: ...
    @overload
    def _read(self, inputs: AnyBatch, share: bool) -> tuple[dict[str, Tensor], Tensor, Sequence | SharedSequence]: ...
    def _read(
        self, inputs: AnyBatch, share: bool = False
    ) -> tuple[dict[str, Tensor], Tensor, Sequence | SharedSequence]:
        """Context columns, target vectors ``[B, d]`` and the history, each distinct item embedded once.

        With ``share`` the items of a history that several rows of a `Batch` have are looked up once, and it stays
        shared if the block gains from as many rows a history as there are.
        """
        if isinstance(inputs, Batch):
            if self.item_features is None:
                raise DataError(f"{type(self).__name__}: a batch of item indices needs the item table (item_features=)")
            batch = inputs.to(self.device)
            if share:
                batch = batch.sharing_neighbours()
            history, owner = batch.history, batch.owner
            rows, place = distinct_items(torch.cat([history.flatten(), batch.target]), self.item_features.num_items)
            features = self.item_features.rows(rows)
            items = self.embedding_layer(features, flatten_emb=True)
            read = Sequence(items, place[: history.numel()].view(history.shape), history > 0, memo=self._memo(features))
            read = timed(read, batch.history_time)
            # F.embedding, not items[...], whose backward adds in any order on CPU threads: runs would not repeat
            target = F.embedding(place[history.numel() :], items)
            if owner is None:
                return batch.context, target, read
            shared = SharedSequence(read, owner)
            stays = share and len(owner) >= len(history) * getattr(self.block, "rows_to_share", MEAN_ROWS)
            return batch.context, target, shared if stays else shared.expanded()
        columns, item_columns, float_mask = inputs
        context = {n: c.to(self.device) for n, c in columns.items() if n in self.context_names}
        features = {n: c.to(self.device) for n, c in item_columns.items()}
        items = self.embedding_layer(features, flatten_emb=True)
        mask = float_mask.to(self.device) > 0
        place = torch.arange(items.shape[0], device=self.device).view(mask.shape[0], -1)
        sequence = Sequence(items, place[:, :-1], mask, memo=self._memo(features))
        return context, F.embedding(place[:, -1], items), sequence if self.longctr_compat else sequence.right_aligned()

    def _memo(self, features: dict[str, Tensor]) -> dict[str, Any]:
        """What a sequence carries of its items' features beside their vectors."""
        return {} if self.category_feature is None else {CATEGORY: features[self.category_feature].long()}

    @property
    def context_names(self) -> list[str]:
        """Features that describe the impression rather than an item."""
        specs = self.feature_map.features
        return [n for n, spec in specs.items() if spec["type"] != "meta" and spec.get("source") != "item"]

    # ---- initialisation ----------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """FuxiCTR's initialisation; a method's experts draw from a stream of their own.

        So a model's backbone starts, and with frozen experts trains, exactly as the plain backbone of the same seed.
        """
        beside = {id(m) for expert in self.expert_modules() for m in expert.modules()}
        _initialise([m for m in self.modules() if id(m) not in beside])
        with isolated_rng():
            _initialise([m for m in self.modules() if id(m) in beside])

    def expert_modules(self) -> list[nn.Module]:
        """Modules that a method adds beside the backbone's own."""
        return [m for layer in self.method_layers() for m in layer.expert_modules()]

    def method_layers(self) -> list[Any]:
        """The method's layers inside the block (none for a plain backbone)."""
        return [m for m in self.block.modules() if self.method is not None and isinstance(m, self.method.layer)]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save_weights(self, checkpoint: str) -> None:
        """Write weights, model name and configuration keys whole or not at all.

        Raises:
            FileError: the file cannot be written; what was there before is untouched.
        """
        write_weights(checkpoint, type(self).__name__, self.config, self.state_dict())

    def place_checkpoints(self, directory: str) -> None:
        """Keep this model's checkpoints in ``directory``, under its ``model_id``."""
        self.model_dir = directory
        self.checkpoint = os.path.join(os.path.abspath(directory), f"{self.model_id}.model")

    def load_weights(self, checkpoint: str) -> None:
        """Load a checkpoint of ours, or a ``.model`` file that LongCTR wrote for the same backbone.

        Raises:
            ConfigError: the file is missing or damaged, or holds another model or other parameters; nothing is loaded then.
        """
        found = read_weights(checkpoint)
        state = self.from_longctr(found.state)
        found.check(type(self).__name__, self.config, self.state_dict(), state)
        self.load_state_dict(state)
        self.to(self.device)

    def from_longctr(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """``state`` under our names: LongCTR keeps the parameters of block and head at the top level."""
        own = self.state_dict()
        if any(name.startswith("block.") for name in state) or all(name in own for name in state):
            return state
        renamed = {}
        for name, value in state.items():
            for theirs, ours in self.backbone.longctr_names.items():
                name = name.replace(theirs, ours)
            if not name.startswith("embedding_layer."):
                name = f"head.{name}" if f"head.{name}" in own else f"block.{name}"
            renamed[name] = value
        return renamed

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part: embedding, block, head; and those in experts and routers."""
        parts = {"embedding": self.embedding_layer, "block": self.block, "head": self.head}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        beside = {id(p): p.numel() for expert in self.expert_modules() for p in expert.parameters()}
        return {**counts, "total": sum(counts.values()), "experts": sum(beside.values())}


def _initialise(modules: list[nn.Module]) -> None:
    """Xavier-normal weights and zero biases for plain Linear and Conv1d, then each module's own FuxiCTR hook."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Conv1d) and type(module) in (nn.Linear, nn.Conv1d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in modules:
        hook = getattr(module, "init_weights", None) or getattr(module, "reset_custom_params", None)
        if callable(hook):
            hook()
