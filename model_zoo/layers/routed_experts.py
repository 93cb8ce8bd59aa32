"""Sparse dispatch: each expert runs only for the rows that chose it, each on its own compacted subsequence."""

from collections.abc import Callable

from torch import Tensor, nn

from model_zoo.layers.attend_items import run_planned
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence


class RoutedExperts(nn.Module):
    """n independent blocks; a row's answer is the gate-weighted sum of its chosen blocks (MoS eq. 6-7).

    An expert that the row's gating token did not choose has weight zero, so leaving it out is exact, for the output and
    for every gradient.

    Args:
        block_factory: makes one expert, a block ``(query [B, d], Sequence) -> [B, out_dim]``.
        num_experts: n >= 1.
    """

    def __init__(self, block_factory: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(block_factory() for _ in range(num_experts))
        self.out_dim: int = self.experts[0].out_dim  # type: ignore[assignment]

    def forward(self, query: Tensor, sequence: Sequence, routing: Routing, active: Tensor) -> Tensor:
        """Weighted expert answers.

        Args:
            query: ``[B, d]`` targets.
            sequence: the tokens that were routed.
            routing: over the same rows and positions.
            active: ``[B]`` bool; rows to serve, the others get zeros.

        Returns:
            ``[B, out_dim]``.
        """
        jobs: list[tuple[nn.Module, Tensor, Tensor, Sequence]] = []  # expert, its rows, their gates, their tokens
        for number, expert in enumerate(self.experts):
            mine = (routing.chosen == number) & active.unsqueeze(1)  # [B, k]
            rows = mine.any(1).nonzero().squeeze(1)
            if rows.numel():
                gate = (routing.gates * mine).sum(1)[rows]
                jobs.append((expert, rows, gate, sequence.select(rows).compact(routing.reads(number, rows))))
        output = query.new_zeros(query.shape[0], self.out_dim)
        if not jobs:
            return output
        queries = [query.index_select(0, rows) for _, rows, _, _ in jobs]
        if all(hasattr(expert, "plan") for expert, _, _, _ in jobs):
            answers = run_planned([job[0] for job in jobs], queries, [job[3] for job in jobs])  # type: ignore[misc]
        else:
            answers = [job[0](rows_query, job[3]) for job, rows_query in zip(jobs, queries, strict=True)]
        for (_, rows, gate, _), answer in zip(jobs, answers, strict=True):
            output = output.index_add(0, rows, (answer * gate.unsqueeze(1)).to(output.dtype))
        return output
