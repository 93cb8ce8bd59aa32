"""FinalMLP's head against its formulas: two streams, their fusion, gates with and without context features."""

from typing import Any

import pytest
import torch
from golden_files import Golden, tiny_dataset
from oracles import gradients
from torch import Tensor, nn

from model_zoo.layers.finalmlp_head import BilinearFusion, FinalMLPHead
from model_zoo.layers.heads import HeadInputs, HeadShape
from model_zoo.registry import get_model

# float64 products of matrices of a dozen columns, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 2


def build(compat: bool = False, **options: Any) -> FinalMLPHead:
    torch.manual_seed(1)
    shape = HeadShape(
        context_dim=3,
        item_dim=4,
        interest_dim=5,
        feature_map=tiny_dataset().feature_map,
        embedding_dim=DIM,
        output_activation=nn.Sigmoid(),
        longctr_compat=compat,
    )
    options = {"mlp1_hidden_units": [6, 8], "mlp2_hidden_units": [4], "fs_hidden_units": [3], **options}
    head = FinalMLPHead(shape, **options).double()
    for weight in head.parameters():
        nn.init.normal_(weight, std=0.7)
    return head


def inputs(rows: int = 6) -> HeadInputs:
    generator = torch.Generator().manual_seed(0)

    def part(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.double).requires_grad_()

    columns = {
        "user_id": torch.randint(1, 42, (rows,), generator=generator),
        "tags": torch.randint(1, 6, (rows, 3), generator=generator),
    }
    return HeadInputs(part(3), part(4), part(5), columns)


def fused(head: FinalMLPHead, first: Tensor, second: Tensor, heads: int) -> Tensor:
    """Eq. 6-8 row by row, head by head."""
    fusion, logits = head.fusion_module, []
    for u, v in zip(head.mlp1(first), head.mlp2(second), strict=True):
        logit = fusion.w_x(u) + fusion.w_y(v)
        size = len(u) // heads * (len(v) // heads)
        for h, (part_u, part_v) in enumerate(zip(u.chunk(heads), v.chunk(heads), strict=True)):
            matrix = fusion.w_xy[h * size : (h + 1) * size, 0].view(len(part_u), len(part_v))
            logit = logit + part_u @ matrix @ part_v
        logits.append(logit)
    return torch.stack(logits)


def gate(head: FinalMLPHead, number: int, given: HeadInputs) -> Tensor:
    """``2 sigmoid(MLP(e))``, e the mean over a sequence feature's tags or a table's row, or the learned vector."""
    module, parts = head.fs_module, []
    assert module is not None
    for name in module.contexts[number - 1]:
        table = getattr(module, f"fs{number}_ctx_emb").embedding_layer.embedding_layers[name].weight
        rows = table[given.columns[name]]
        if name == "tags":  # FuxiCTR's pooling counts the vectors that do not sum to zero: all of them
            rows = rows.sum(1) / rows.shape[1]
        parts.append(rows)
    joined = torch.cat(parts, 1) if parts else getattr(module, f"fs{number}_ctx_bias").expand(len(given.target), -1)
    linear1, relu, linear2, _ = getattr(module, f"fs{number}_gate").mlp
    return 2 * torch.sigmoid(linear2(relu(linear1(joined))))


def assert_same(head: FinalMLPHead, given: HeadInputs, expected: Tensor) -> None:
    output = head(given)
    assert output.shape == (len(given.target), 1)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [given.context, given.target, given.interest, *head.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("use_fs", [False, True])
def test_the_head_is_two_streams_and_their_fusion(heads, use_fs):
    head, given = build(num_heads=heads, use_fs=use_fs), inputs()
    assert_same(head, given, fused(head, given.joined(), given.joined(), heads))


@pytest.mark.parametrize(
    "context1, context2", [(["user_id"], ["tags"]), (["user_id", "tags"], ["user_id"]), (["tags"], []), ([], ["user_id"])]
)
def test_context_features_gate_each_streams_input(context1, context2):
    head, given = build(fs1_context=context1, fs2_context=context2), inputs()
    joined = given.joined()
    assert_same(head, given, fused(head, joined * gate(head, 1, given), joined * gate(head, 2, given), 1))
    for number, context in ((1, context1), (2, context2)):
        assert hasattr(head.fs_module, f"fs{number}_ctx_emb") == bool(context)
        assert hasattr(head.fs_module, f"fs{number}_ctx_bias") == (not context)


def test_without_a_context_feature_no_gates_are_built_but_in_longctr():
    """LongCTR builds them, whatever their context, and never calls them."""
    assert build().fs_module is None and build(use_fs=False, fs1_context=["tags"]).fs_module is None
    assert build(compat=True, use_fs=False).fs_module is None
    for context in ([], ["user_id"]):
        head, given = build(compat=True, fs1_context=context), inputs()
        assert head.fs_module is not None
        assert_same(head, given, fused(head, given.joined(), given.joined(), 1))
        unused = [p for name, p in head.named_parameters() if name.startswith("fs_module.")]
        assert len(unused) == 10 and not any(g.any() for g in gradients(head(given), unused))


def test_the_gates_that_the_default_leaves_out_are_a_quarter_of_the_recorded_model():
    record = Golden("FinalMLP_2")
    found = [
        get_model("FinalMLP")(record.feature_map, **record.hparams, longctr_compat=compat).parameter_counts()["head"]
        for compat in (True, False)
    ]
    assert found[0] - found[1] == 1896


def test_options_reach_their_stream():
    head = build(
        mlp1_hidden_units=[6, 4],
        mlp1_dropout=0.5,
        mlp2_batch_norm=True,
        mlp1_hidden_activations="Tanh",
        mlp2_hidden_activations="Dice",
    )
    kinds1, kinds2 = ([type(m).__name__ for m in net.mlp] for net in (head.mlp1, head.mlp2))
    assert kinds1 == ["Linear", "Tanh", "Dropout"] * 2 and kinds2 == ["Linear", "BatchNorm1d", "Dice"]


def test_a_batch_of_one_is_a_row_of_a_batch():
    head, whole = build(fs1_context=["user_id"], num_heads=2).eval(), inputs()
    for row in range(6):
        columns = {name: column[[row]] for name, column in whole.columns.items()}
        one = HeadInputs(whole.context[[row]], whole.target[[row]], whole.interest[[row]], columns)
        torch.testing.assert_close(head(one), head(whole)[[row]], **EXACT)


def test_fusion_of_given_numbers():
    """u = (1, 2), v = (3, 4), two heads: 1 * 5 * 3 + 2 * 6 * 4 + w_x u + w_y v."""
    fusion = BilinearFusion(2, 2, 2)
    with torch.no_grad():
        fusion.w_xy.copy_(torch.tensor([[5.0], [6.0]]))
        for layer, weight, bias in ((fusion.w_x, [1.0, 10.0], 0.5), (fusion.w_y, [100.0, 1000.0], 0.25)):
            layer.weight.copy_(torch.tensor([weight]))
            layer.bias.fill_(bias)
    found = fusion(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    assert found.tolist() == [[15.0 + 48.0 + 21.0 + 4300.0 + 0.75]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mlp1_hidden_units": []}, r"mlp1_hidden_units must name at least one layer, not \[\]"),
        ({"num_heads": 3}, r"num_heads \(3\) must divide the last of mlp1_hidden_units \(8\)"),
        ({"num_heads": 8}, r"num_heads \(8\) must divide the last of mlp2_hidden_units \(4\)"),
        ({"num_heads": 0}, r"num_heads \(0\) must divide"),
        ({"fs1_context": ["item_id"]}, "fs1_context: 'item_id' is not a context feature"),
        ({"fs2_context": ["usr_id"]}, "fs2_context: 'usr_id' is not a context feature"),
        ({"fs2_context": ["user_index"]}, "fs2_context: 'user_index' is not a context feature"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
