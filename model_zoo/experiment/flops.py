"""Floating-point operations: counted as a model runs, and by the MoS paper's formula fed with measured routed lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model_zoo.backbones.mamba4rec import Mamba4RecBlock
from model_zoo.backbones.sdim import CollisionPooling, SDIMBlock
from model_zoo.backbones.transact import TransActBlock
from model_zoo.backbones.twin import TwinBlock
from model_zoo.batch import AnyBatch
from model_zoo.layers.blocks import call_block
from model_zoo.layers.heads import HeadInputs, Loss
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention
from model_zoo.sequential_ctr import SequentialCTR

aten = torch.ops.aten

#: torch's formulas for matrix products, and those of products that it leaves out
PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
    aten.mv: lambda matrix, vector, **_: 2 * matrix.numel(),
    aten.dot: lambda left, right, **_: 2 * left.numel(),
}
#: operations per element of the result of elementwise functions; any other has one, whatever it computes
ELEMENTWISE = {
    **dict.fromkeys((aten.clone, aten.where, aten.masked_fill, aten.fill, aten.copy, aten._to_copy), 0),
    **dict.fromkeys((aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_), 2),
    **dict.fromkeys((aten.lerp, aten.lerp_), 3),
}
#: operations per element of the first argument: sums, softmax (difference, exponential, sum, quotient), normalisations
PER_INPUT = {
    **dict.fromkeys((aten.sum, aten.mean, aten.cumsum, aten.embedding_dense_backward), 1),
    aten.linalg_vector_norm: 2,
    **dict.fromkeys((aten.softmax, aten._softmax, aten._safe_softmax, aten._softmax_backward_data), 4),
    **dict.fromkeys((aten.native_layer_norm, aten.native_batch_norm), 7),
    **dict.fromkeys((aten.native_layer_norm_backward, aten.native_batch_norm_backward), 14),
}
#: sums of rows of a table, by index
BAGS = (aten._embedding_bag, aten._embedding_bag_forward_only, aten._embedding_bag_backward)


@dataclass(frozen=True)
class Flops:
    """Operations of matrix products (a multiply-add is two), and of everything else."""

    products: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.products + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(self.products + more.products, self.other + more.other)


class FlopCounter(TorchDispatchMode):
    """Counts every operator that PyTorch runs inside ``with FlopCounter() as counter``, backward passes included.

    Custom autograd functions and loops over time are counted by the operators in them, at the shapes of the call.
    Comparing, moving and drawing numbers, and arithmetic on integers (hashing, indexing), count as nothing.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = Flops()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = func.overloadpacket
        if kind in PRODUCTS:
            self.flops += Flops(products=PRODUCTS[kind](*args, **kwargs, out_val=result))
        else:
            self.flops += Flops(other=_arithmetic(func, kind, args, kwargs, result))
        return result


def _arithmetic(func: Any, kind: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one operator that is no matrix product."""
    first = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return 0
    if kind in PER_INPUT:
        return PER_INPUT[kind] * args[0].numel()
    if kind in (aten.index_add, aten.index_add_):
        return args[3].numel()
    if kind in BAGS:
        place = [argument.name for argument in func._schema.arguments].index("per_sample_weights")
        weighted = (args[place] if place < len(args) else kwargs.get("per_sample_weights")) is not None
        return (2 if weighted else 1) * args[1].numel() * args[0].shape[1]
    if kind is aten._embedding_bag_per_sample_weights_backward:
        return 2 * args[2].numel() * args[0].shape[1]
    return ELEMENTWISE.get(kind, 1) * first.numel() if torch.Tag.pointwise in func.tags else 0


# ---- what runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartFlops:
    """One part of a model on one batch: prediction, and a training step's forward and backward (no optimizer)."""

    prediction: Flops
    training: Flops


@dataclass(frozen=True)
class FlopReport:
    """Counted operations of one batch of ``rows``: embedding, sequence block (experts and routers included), and head."""

    rows: int
    embedding: PartFlops
    block: PartFlops
    head: PartFlops


def block_flops(model: SequentialCTR, batch: AnyBatch) -> FlopReport:
    """Count what runs when ``model`` predicts a batch, and when it trains on it, as it stands.

    Parameters that are frozen have no backward; experts that serve no row do not run. The model is left as it was, its
    codebooks and normalisation statistics too, and so is torch's random state.
    """
    parts = ("embedding", "block", "head")
    with _undisturbed(model):
        model.eval()
        with torch.no_grad():
            prediction = dict(zip(parts, _count(model, batch, backward=False), strict=True))
        model.train()
        with torch.enable_grad():
            training = dict(zip(parts, _count(model, batch, backward=True), strict=True))
    return FlopReport(len(model.get_labels(batch)), **{name: PartFlops(prediction[name], training[name]) for name in parts})


def _count(model: SequentialCTR, batch: AnyBatch, backward: bool) -> tuple[Flops, Flops, Flops]:
    """Embedding, block and head, each between leaves of its own."""
    label = model.get_labels(batch)
    with FlopCounter() as embedding:
        context, target, sequence = model._read(batch)
        embedded = model.embedding_layer(context, flatten_emb=True) if context else None
    given = [target, sequence.items] + ([] if embedded is None else [embedded])
    leaves = [tensor.detach().requires_grad_(backward and tensor.requires_grad) for tensor in given]
    query, items, *embedded_leaf = leaves
    sequence = Sequence(items, sequence.index, sequence.mask)
    losses: list[Loss] = []
    with FlopCounter() as block:
        interest = call_block(model.block, query, sequence, losses)
        if backward:
            _differentiate([interest, *_values(losses, label)], [query, items, *model.block.parameters()])
    read = interest.detach().requires_grad_(backward)
    losses = []
    with FlopCounter() as head:
        logits = model.head(HeadInputs(embedded_leaf[0] if embedded_leaf else None, query, read, context, losses))
        if backward:
            _differentiate([logits, *_values(losses, label)], [read, query, *embedded_leaf, *model.head.parameters()])
    if backward:
        with embedding:
            _differentiate(given, list(model.embedding_layer.parameters()))
    return embedding.flops, block.flops, head.flops


def _values(losses: list[Loss], label: Tensor) -> list[Tensor]:
    return [term(label) if callable(term) else term for term in losses]


def _differentiate(outputs: ListOf[Tensor], inputs: ListOf[Tensor]) -> None:
    """One backward pass from outputs to inputs, leaving no ``.grad``."""
    outputs = [output for output in outputs if output.requires_grad]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    if outputs and inputs:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs], allow_unused=True)


@contextmanager
def _undisturbed(model: SequentialCTR) -> Iterator[None]:
    """Whatever runs inside leaves the model's state, its mode and torch's random state as they were."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    training = model.training
    with torch.random.fork_rng([model.device.index or 0] if model.device.type == "cuda" else []):
        try:
            yield
        finally:
            model.load_state_dict(state)
            model.train(training)


# ---- the paper's accounting ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutedBranch:
    """What one router gave its experts.

    Attributes:
        name: the router's in its layer: ``item_router``, ``window_router`` or ``router``.
        experts: the blocks.
        lengths: ``[B, n]`` tokens that each expert reads of each row.
        serves: ``[B, n]`` bool, whether the expert has a weight in the row's answer.
    """

    name: str
    experts: ListOf[nn.Module]
    lengths: Tensor
    serves: Tensor


@dataclass(frozen=True)
class RoutedBatch:
    """The blocks of a method's layer and what they read in one batch, ``histories [B]`` items by the shared block."""

    shared: nn.Module
    histories: Tensor
    branches: ListOf[RoutedBranch]


@torch.no_grad()
def route(model: SequentialCTR, batch: AnyBatch) -> RoutedBatch:
    """Routed lengths of a batch in prediction, as the routers tell them while a model over a method runs."""
    layer = model.method_layers()[0]
    branches: list[RoutedBranch] = []

    def listen(name: str, experts: ListOf[nn.Module]) -> Callable[..., None]:
        def hook(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
            mask = args[0].mask
            lengths = (routing.members & mask.unsqueeze(2)).sum(1)
            branches.append(RoutedBranch(name, experts, lengths, (routing.gates != 0) & mask.any(1, keepdim=True)))

        return hook

    hooks = [
        child.register_forward_hook(listen(name, list(getattr(layer, name.replace("router", "experts")).experts)))
        for name, child in layer.named_children()
        if name.endswith("router")
    ]
    with _undisturbed(model):
        try:
            model.eval()
            model(batch)
        finally:
            for handle in hooks:
                handle.remove()
    return RoutedBatch(layer.global_expert, model._read(batch)[2].lengths, branches)


@dataclass(frozen=True)
class AnalyticFlops:
    """The paper's accounting, in operations per batch.

    Attributes:
        shared: the global (shared) expert on the whole history.
        every_expert: all experts, each on all tokens routed to it (the paper's counting).
        serving_experts: of these, the experts with a weight in a row's answer.
    """

    shared: float
    every_expert: float
    serving_experts: float


def analytic_flops(routed: RoutedBatch, cost: Callable[[nn.Module, Tensor], Tensor] | None = None) -> AnalyticFlops:
    """``sum_e cost(block, tokens routed to e)`` with measured routed lengths; routers are not counted, as in the paper.

    Args:
        routed: a batch.
        cost: of a block for histories of the given lengths; None = `block_cost`. ``lambda block, t: t**2`` gives the
            paper's own comparison, in units of one pair of tokens.

    Source: MoS: Mixture of Sequence (WWW 2026), complexity analysis.
    """
    cost = cost or block_cost
    every = serving = 0.0
    for branch in routed.branches:
        for number, expert in enumerate(branch.experts):
            spent = cost(expert, branch.lengths[:, number].double())
            every += float(spent.sum())
            serving += float(spent[branch.serves[:, number]].sum())
    return AnalyticFlops(float(cost(routed.shared, routed.histories.double()).sum()), every, serving)


def block_cost(block: nn.Module, lengths: Tensor) -> Tensor:
    """Operations of a block that computes every position of histories of the given lengths, as LongCTR's models do.

    A projection of a token from a to b numbers has 2ab operations; scores and values have 4Ta for one query, 4T^2 a for T
    of them; norms, activations and softmax are left out. Empty histories cost nothing.

    Args:
        block: a block of TWIN, SDIM, TransAct or Mamba4Rec, or a long branch of the first two.
        lengths: float, any shape.

    Raises:
        ValueError: another block.
    """
    if isinstance(block, TwinBlock | SDIMBlock):
        long = block.long_attention if isinstance(block, TwinBlock) else block.long
        return block_cost(block.short_attention, lengths.clamp(max=block.short_seq_len - 1)) + block_cost(long, lengths)
    if isinstance(block, TargetAttention):
        spent = _attention_cost(block, lengths)
    elif isinstance(block, CollisionPooling):
        bits = block.lsh.num_hashes * block.lsh.hash_bits
        spent = 2 * block.out_dim * ((lengths + 1) * bits + lengths)
        spent = spent + (0 if block.output is None else 2 * block.out_dim**2)
    elif isinstance(block, TransActBlock):
        first: Any = block.layers[0]
        width, inner = first.linear1.in_features, first.linear1.out_features
        spent = len(block.layers) * (lengths * (8 * width**2 + 4 * width * inner) + 4 * lengths**2 * width)
        spent = spent + (0 if block.out_linear is None else 2 * width**2)
    elif isinstance(block, Mamba4RecBlock):
        spent = lengths * _mamba_cost(block)
    else:
        raise ValueError(f"no formula for the operations of {type(block).__name__}; give one as cost=")
    return torch.where(lengths > 0, spent, 0.0)


def _attention_cost(layer: TargetAttention, lengths: Tensor) -> Tensor:
    """Four projections, scores of all tokens, values of those kept."""
    width = len(layer.W_q.weight) if layer.use_qkvo else layer.out_dim
    kept = lengths if layer.topk is None else lengths.clamp(max=layer.topk)
    projections = 4 * layer.out_dim * width * (1 + lengths) if layer.use_qkvo else 0
    return projections + 2 * width * (lengths + kept)


def _mamba_cost(block: Mamba4RecBlock) -> int:
    """Operations per token: projections, convolution, seven per state of the scan, feed-forward net."""
    spent = 0 if block.widen is None else 2 * block.widen.weight.numel()
    for layer in block.layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear | nn.Conv1d)]
        spent += sum(2 * linear.weight.numel() for linear in linears) + 7 * layer.mamba.A_log.numel()  # type: ignore
    return spent
