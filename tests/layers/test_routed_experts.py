"""Dispatch of rows to experts: who runs, on which rows and tokens, and with what weight."""

import torch
from oracles import ragged, rows_of
from torch import Tensor, nn

from model_zoo.layers.routed_experts import RoutedExperts
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence


class Recorder(nn.Module):
    """Answers one number and remembers the rows and tokens it was given."""

    out_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.ones(1, dtype=torch.double))
        self.calls: list[tuple[Tensor, Sequence]] = []

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        self.calls.append((query, sequence))
        return self.answer.expand(len(query), 2)


def case() -> tuple[RoutedExperts, Tensor, Sequence, Routing]:
    """Three rows of three tokens; experts 0 and 2 chosen by the first row, 2 and 1 by the second; 3 by nobody."""
    layer = RoutedExperts(Recorder, 4)
    with torch.no_grad():
        for number, expert in enumerate(layer.experts):
            expert.answer.fill_(10.0**number)
    experts = torch.tensor([[[0, 1], [2, 3], [0, 2]], [[2, 0], [1, 2], [2, 1]], [[0, 1], [0, 1], [0, 1]]])
    gates = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]], dtype=torch.double)
    members = torch.zeros(3, 3, 4, dtype=torch.bool).scatter_(2, experts, True)
    by_expert = torch.zeros(3, 4, dtype=torch.double).scatter_(1, experts[:, -1], gates)
    return layer, torch.randn(3, 2, dtype=torch.double), ragged([3, 2, 3], 2), Routing(members, by_expert)


def test_an_answer_is_the_gate_weighted_sum_of_the_chosen_experts():
    layer, query, sequence, routing = case()
    output = layer(query, sequence, routing, torch.tensor([True, True, True]))
    assert output[:, 0].tolist() == [0.25 * 1 + 0.75 * 100, 0.5 * 100 + 0.5 * 10, 0.9 * 1 + 0.1 * 10]


def test_only_chosen_experts_run_and_only_on_rows_that_chose_them():
    layer, query, sequence, routing = case()
    layer(query, sequence, routing, torch.tensor([True, True, False]))
    given = [[row for q, _ in expert.calls for row in q.tolist()] for expert in layer.experts]
    rows = query.tolist()
    assert given == [[rows[0]], [rows[1]], [rows[0], rows[1]], []]


def test_an_expert_reads_the_real_tokens_routed_to_it_and_no_others():
    layer, query, sequence, routing = case()
    layer(query, sequence, routing, torch.tensor([True, True, False]))
    ((_, tokens),) = layer.experts[2].calls
    first, second = rows_of(tokens.vectors, tokens.mask)
    assert torch.equal(first, sequence.vectors[0, [1, 2]])
    assert torch.equal(second, sequence.vectors[1, [1, 2]])  # the row's first position is padding


def test_inactive_rows_get_exact_zeros():
    layer, query, sequence, routing = case()
    output = layer(query, sequence, routing, torch.tensor([False, True, False]))
    assert output[[0, 2]].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    nobody = layer(query, sequence, routing, torch.tensor([False, False, False]))
    assert torch.equal(nobody, torch.zeros(3, 2, dtype=torch.double))


def test_experts_that_nobody_chose_have_no_gradient():
    layer, query, sequence, routing = case()
    layer(query, sequence, routing, torch.tensor([True, True, True])).sum().backward()
    assert [expert.answer.grad is not None for expert in layer.experts] == [True, True, True, False]
