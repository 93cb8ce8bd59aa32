"""Small MoS layers and batches, and the comparison with the dense form."""

from typing import Any

import torch
from oracles import gradients, mos, ragged
from torch import nn

from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention

# float64: at most some hundred terms of order one, summed in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 5
LENGTHS = [9, 1, 0, 4, 17, 3]


def twin_block() -> nn.Module:
    return TwinBlock(DIM, attention_dim=4, num_heads=2, short_seq_len=4, topk=3)


def attention_block() -> nn.Module:
    return TargetAttention(DIM, 4, 2)


def spread(layer: nn.Module, seed: int) -> nn.Module:
    """Parameters and codes large enough for every choice (top-k, themes) to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*layer.parameters(), *(b for n, b in layer.named_buffers() if n.endswith("codes"))]:
            value.copy_(torch.randn(value.shape, generator=generator))
    return layer


def build(block=twin_block, seed: int = 0, **options: Any) -> MoS:
    """A small layer; its routers have biases because at this width h is often 0 without, and then all themes tie."""
    defaults = {"n_item_experts": 3, "n_window_experts": 3, "codebook_dim": 4, "window_size": 4, "window_stride": 2,
                "router_bias": True}  # fmt: skip
    layer = spread(MoS(block, DIM, **{**defaults, **options}), seed).double()
    assert isinstance(layer, MoS)
    return layer


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0) -> tuple[torch.Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding)


def assert_equals_dense_form(layer: MoS, query: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Outputs and the gradients of every parameter, of the items and of the targets."""
    output, expected = layer(query, sequence), mos(layer, query, sequence.vectors, sequence.mask)
    torch.testing.assert_close(output, expected, **EXACT)
    named = dict(layer.named_parameters())
    leaves = [query, sequence.items, *named.values()]
    found, wanted = gradients(output, leaves), gradients(expected, leaves)
    for name, got, want in zip(["query", "items", *named], found, wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    return output
