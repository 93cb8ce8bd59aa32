"""Cross heads against their formulas, in every structure."""

from typing import Any

import pytest
import torch
from golden_files import tiny_dataset
from oracles import gradients
from torch import Tensor, nn

from model_zoo.layers.cross_head import DCNv2Head, TransActHead
from model_zoo.layers.heads import HeadInputs, HeadShape

# float64 products of matrices of a dozen columns, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTHS = {"context_dim": 3, "item_dim": 4, "interest_dim": 5}


def shape(**widths: int) -> HeadShape:
    return HeadShape(
        **{**WIDTHS, **widths},
        feature_map=tiny_dataset().feature_map,
        embedding_dim=2,
        output_activation=nn.Sigmoid(),
    )


def build(cls: Any, context: bool = True, **options: Any) -> Any:
    torch.manual_seed(1)
    head = cls(shape() if context else shape(context_dim=0), **options).double()
    for weight in head.parameters():
        nn.init.normal_(weight, std=0.7)
    return head


def inputs(rows: int = 6, context: bool = True) -> HeadInputs:
    generator = torch.Generator().manual_seed(0)

    def part(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.double).requires_grad_()

    return HeadInputs(part(3) if context else None, part(4), part(5), {})


def assert_same(head: nn.Module, given: HeadInputs, expected: Tensor) -> None:
    output = head(given)
    assert output.shape == (len(given.target), 1)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [p for p in (given.context, given.target, given.interest) if p is not None] + [*head.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def crossed(head: Any, joined: Tensor) -> Tensor:
    """DCN V2 eq. 1, row by row."""
    rows = []
    for first in joined:
        row = first
        for layer in head.crossnet.cross_layers:
            row = row + first * (layer.weight @ row + layer.bias)
        rows.append(row)
    return torch.stack(rows)


def mixed(head: Any, joined: Tensor) -> Tensor:
    """DCN V2 eq. 4 with a softmax over the gates, row by row and expert by expert."""
    net = head.crossnet
    rows = []
    for first in joined:
        row = first
        for u, v, c, bias in zip(net.U_list, net.V_list, net.C_list, net.bias, strict=True):
            gates = torch.stack([gate(row) for gate in net.gating]).softmax(0)
            maps = [u[e] @ torch.tanh(c[e] @ torch.tanh(v[e].T @ row)) + bias[:, 0] for e in range(net.num_experts)]
            row = row + sum(gate * first * answer for gate, answer in zip(gates, maps, strict=True))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("on_top", [None, [], [7]])
def test_transacts_head_is_cross_network_beside_a_net_and_a_net_on_top(context, layers, on_top):
    head = build(TransActHead, context, dcn_cross_layers=layers, dcn_hidden_units=[6, 3], mlp_hidden_units=on_top)
    given = inputs(context=context)
    parts = [given.target, given.interest]
    joined = torch.cat([given.context, *parts] if context else parts, 1)
    assert_same(head, given, head.mlp(torch.cat([crossed(head, joined), head.parallel_dnn(joined)], 1)))
    assert head.mlp.mlp[0].in_features == joined.shape[1] + 3


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("structure", ["crossnet_only", "stacked", "parallel", "stacked_parallel"])
def test_dcnv2s_structures(structure, low_rank, context):
    head = build(
        DCNv2Head,
        context,
        model_structure=structure,
        use_low_rank_mixture=low_rank,
        low_rank=2,
        num_experts=3,
        num_cross_layers=2,
        stacked_dnn_hidden_units=[6],
        parallel_dnn_hidden_units=[7, 3],
    )
    given = inputs(context=context)
    joined = given.joined()
    cross = (mixed if low_rank else crossed)(head, joined)
    parts = [head.stacked_dnn(cross) if "stacked" in structure else cross]
    if "parallel" in structure:
        parts.append(head.parallel_dnn(joined))
    assert_same(head, given, head.fc(torch.cat(parts, 1)))
    unused = {"stacked": {"parallel_dnn"}, "parallel": {"stacked_dnn"}, "stacked_parallel": set()}
    built = {name.split(".")[0] for name, _ in head.named_parameters()}
    wanted = {"crossnet", "fc", "stacked_dnn", "parallel_dnn"}
    assert built == wanted - unused.get(structure, {"stacked_dnn", "parallel_dnn"})


@pytest.mark.parametrize("structure", ["crossnet_only", "stacked", "parallel", "stacked_parallel"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_batch_of_one_is_a_row_of_a_batch(structure, low_rank):
    """FuxiCTR's mixture drops the batch axis of a batch of one."""
    units = {"stacked_dnn_hidden_units": [6], "parallel_dnn_hidden_units": [7]}
    head = build(DCNv2Head, model_structure=structure, use_low_rank_mixture=low_rank, low_rank=2, **units).eval()
    whole = inputs()
    for row in range(6):
        one = HeadInputs(whole.context[[row]], whole.target[[row]], whole.interest[[row]], {})
        torch.testing.assert_close(head(one), head(whole)[[row]], **EXACT)


@pytest.mark.parametrize("cls, key", [(TransActHead, "dcn_hidden_units"), (DCNv2Head, "parallel_dnn_hidden_units")])
def test_dropout_and_batch_norm_reach_the_net_beside(cls, key):
    head = build(cls, **{key: [6, 3]}, net_dropout=0.5, batch_norm=True)
    kinds = [type(m) for m in head.parallel_dnn.modules()]
    assert kinds.count(nn.Dropout) == 2 and kinds.count(nn.BatchNorm1d) == 2
    others = [m for name, m in head.named_modules() if not name.startswith("parallel_dnn")]
    assert not any(isinstance(m, nn.Dropout | nn.BatchNorm1d) for m in others)


def test_defaults_are_longctrs():
    head = TransActHead(shape())
    assert [m.out_features for m in head.parallel_dnn.mlp if isinstance(m, nn.Linear)] == [256, 128, 64]
    assert len(head.crossnet.cross_layers) == 3 and len(head.mlp.mlp) == 1
    head = DCNv2Head(shape())
    assert [m.out_features for m in head.parallel_dnn.mlp if isinstance(m, nn.Linear)] == [500, 500, 500]
    assert len(head.crossnet.cross_layers) == 3 and head.stacked_dnn is None


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (TransActHead, {"dcn_hidden_units": []}, r"dcn_hidden_units must name at least one layer, not \[\]"),
        (TransActHead, {"dcn_cross_layers": -1}, "dcn_cross_layers must be at least 0, not -1"),
        (DCNv2Head, {"parallel_dnn_hidden_units": []}, "parallel_dnn_hidden_units must name at least one layer"),
        (
            DCNv2Head,
            {"model_structure": "stacked", "stacked_dnn_hidden_units": []},
            "stacked_dnn_hidden_units must name at least one layer",
        ),
        (DCNv2Head, {"num_cross_layers": -2}, "num_cross_layers must be at least 0, not -2"),
        (DCNv2Head, {"low_rank": 0}, "low_rank must be at least 1, not 0"),
        (DCNv2Head, {"num_experts": 0}, "num_experts must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        build(cls, **options)


def test_layers_that_the_structure_does_not_use_are_not_checked():
    build(DCNv2Head, model_structure="crossnet_only", stacked_dnn_hidden_units=[], parallel_dnn_hidden_units=[])
