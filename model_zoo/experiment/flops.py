"""A model's floating-point operations on a batch, counted as it runs, and what its routers give its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.batch import AnyBatch
from model_zoo.experiment.flops_counter import FlopCounter, Flops
from model_zoo.layers.blocks import call_block
from model_zoo.layers.heads import HeadInputs, Loss
from model_zoo.layers.routers import Routing
from model_zoo.layers.windows import CATEGORY
from model_zoo.sequential_ctr import SequentialCTR


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
    kept = {name: sequence.memo[name] for name in (CATEGORY,) if name in sequence.memo}
    sequence = replace(sequence, items=items, memo=kept)
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


# ---- what is routed ------------------------------------------------------------------------------------------------------


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
