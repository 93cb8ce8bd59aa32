"""The theme codebook of MoS: one vector per theme, moved by an exponential moving average, started by k-means."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

COSINE_EPS = 1e-8
#: Laplace smoothing of the cluster sizes in ``ema_mode="count"``
COUNT_EPS = 1e-5
#: points that k-means restarts see
RESTART_SAMPLE = 8192

EmaMode = Literal["batch_mean", "count"]


class ThemeCodebook(nn.Module):
    """W in R^{n x D} with cosine scores and the EMA update of MoS, eq. 3-4.

    ``ema_mode="batch_mean"`` is eq. 4 as printed: ``W_i <- g W_i + (1-g) mean{h(x) : x routed to i}``, codes without
    members stay. ``ema_mode="count"`` is the VQ-VAE form: member counts and sums are averaged, the code is their ratio with
    Laplace-smoothed counts.

    Args:
        num_themes: n.
        dim: D.
        decay: g of eq. 4.
        ema_mode: see above.
        normalize: average unit vectors h / |h| instead of h.
        learned: W is a parameter trained by gradient and never by EMA (the variant the paper warns of).
        revive_after: a code without a member for this many updates is replaced by a token of the batch; 0 = never.
    """

    codes: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor
    size_is_share: Tensor
    idle_updates: Tensor

    def __init__(
        self,
        num_themes: int,
        dim: int,
        *,
        decay: float = 0.999,
        ema_mode: EmaMode = "batch_mean",
        normalize: bool = False,
        learned: bool = False,
        revive_after: int = 0,
    ) -> None:
        super().__init__()
        self.num_themes = num_themes
        self.decay = decay
        self.ema_mode = ema_mode
        self.normalize = normalize
        self.learned = learned
        self.revive_after = revive_after
        start = F.normalize(torch.randn(num_themes, dim), dim=1)
        if learned:
            self.codes = nn.Parameter(start)
        else:
            self.register_buffer("codes", start)
        self.register_buffer("cluster_size", torch.zeros(num_themes))
        self.register_buffer("cluster_sum", torch.zeros(num_themes, dim))
        self.register_buffer("size_is_share", torch.zeros((), dtype=torch.bool))
        self.register_buffer("idle_updates", torch.zeros(num_themes, dtype=torch.long))

    def cosine(self, hidden: Tensor, *, fixed: bool = False) -> Tensor:
        """Eq. 3: cosine of each ``hidden [..., D]`` to each code, ``[..., n]``, at the codes' precision.

        Args:
            fixed: learned codes get no gradient either.
        """
        codes = self.codes if self.learned and not fixed else self.codes.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            unit = F.normalize(hidden.to(codes.dtype), dim=-1, eps=COSINE_EPS)
            return unit @ F.normalize(codes, dim=-1, eps=COSINE_EPS).T

    @torch.no_grad()
    def nearest(self, hidden: Tensor, topk: int) -> Tensor:
        """The themes of the ``topk`` largest cosines, ``[N, D] -> [N, k]`` int64.

        Which they are does not depend on the length of ``hidden``, so that is not divided out.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            scores = hidden.to(self.codes.dtype) @ F.normalize(self.codes, dim=-1, eps=COSINE_EPS).T
        if topk == 1:
            return scores.max(-1, keepdim=True).indices  # a third of the time of topk(1)
        return scores.topk(topk, dim=-1).indices

    @torch.no_grad()
    def ema_update(self, hidden: Tensor, themes: Tensor, weight: Tensor) -> None:
        """Eq. 4 over one batch; a no-op for a learned codebook.

        With ``torch.distributed`` initialised the members of all ranks count.

        Args:
            hidden: ``[N, D]`` router vectors of distinct tokens.
            themes: ``[N, k]`` int64 themes of each token, no theme twice.
            weight: ``[N]`` how often each token occurs in the batch (0 = not at all).
        """
        if self.learned:
            return
        hidden = hidden.detach().to(self.codes.dtype)
        if self.normalize:
            hidden = F.normalize(hidden, dim=-1, eps=COSINE_EPS)
        weight = weight.to(hidden.dtype)
        member = hidden.new_zeros(len(hidden), self.num_themes).scatter_(1, themes, weight.unsqueeze(1).expand_as(themes))
        with torch.autocast(hidden.device.type, enabled=False):
            count, total = member.sum(0), member.T @ hidden
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        present = count > 0
        if self.ema_mode == "batch_mean":
            mean = total / count.clamp(min=1.0).unsqueeze(1)
            moved = self.decay * self.codes + (1 - self.decay) * mean
            self.codes.copy_(torch.where(present.unsqueeze(1), moved, self.codes))
        else:
            if bool(self.size_is_share):  # k-means knows shares; a batch's size is known only now
                self.cluster_size.mul_(count.sum())
                self.cluster_sum.mul_(count.sum())
                self.size_is_share.fill_(False)
            self.cluster_size.mul_(self.decay).add_(count, alpha=1 - self.decay)
            self.cluster_sum.mul_(self.decay).add_(total, alpha=1 - self.decay)
            size = self.cluster_size.sum()
            smoothed = (self.cluster_size + COUNT_EPS) / (size + self.num_themes * COUNT_EPS) * size
            alive = (self.cluster_size > 0).unsqueeze(1)
            self.codes.copy_(torch.where(alive, self.cluster_sum / smoothed.unsqueeze(1), self.codes))
        self.idle_updates.add_(1).masked_fill_(present, 0)
        if self.revive_after:
            self._revive(hidden, weight)

    def _revive(self, hidden: Tensor, weight: Tensor) -> None:
        """Replace codes idle for ``revive_after`` updates by tokens drawn by occurrence."""
        dead = (self.idle_updates >= self.revive_after).nonzero().squeeze(1)
        if dead.numel() == 0 or not bool((weight > 0).any()):
            return
        drawn = hidden[torch.multinomial(weight, dead.numel(), replacement=True)]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(drawn, 0)
        self.codes[dead] = drawn
        self.cluster_size[dead] = 1.0
        self.cluster_sum[dead] = drawn
        self.idle_updates[dead] = 0

    @torch.no_grad()
    def start_from(self, centroids: Tensor, sizes: Tensor) -> None:
        """Take k-means centroids ``[n, D]`` (and cluster ``sizes [n]``, for the count form) as the codes."""
        self.codes.copy_(centroids)
        share = sizes.to(self.cluster_size) / sizes.sum().clamp(min=1)
        self.cluster_size.copy_(share)
        self.cluster_sum.copy_(self.codes.detach() * share.unsqueeze(1))
        self.size_is_share.fill_(True)
        self.idle_updates.zero_()


def cosine_kmeans(
    points: Tensor, weight: Tensor, num_clusters: int, seed: int, restarts: int = 10, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Weighted k-means with cosine assignment and plain means as centroids, the geometry of eq. 3-4.

    k-means++ seeding on unit vectors; an empty cluster restarts at the point farthest from its centroid. Restarts run on
    a sample of the points; the best of them, by weighted cosine, is iterated on all.

    Args:
        points: ``[N, D]``, N >= 1.
        weight: ``[N]`` occurrences of each point, > 0.
        seed: the result is a function of the arguments alone.

    Returns:
        ``(centroids [n, D] float32, sizes [n])`` on ``points``' device; themes in order of falling size.
    """
    points, weight = points.float(), weight.float()
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(points), generator=generator)[:RESTART_SAMPLE].to(points.device)
    unit = F.normalize(points[sample], dim=1, eps=COSINE_EPS)
    runs = []
    for _ in range(restarts):
        seeds = _plus_plus(unit, weight[sample], num_clusters, generator)
        runs.append(_lloyd(points[sample], weight[sample], seeds, iterations))
    best = max(runs, key=lambda run: run[2])
    centroids, sizes, _ = _lloyd(points, weight, best[0], iterations)
    order = sizes.argsort(descending=True, stable=True)
    return centroids[order], sizes[order]


def _lloyd(points: Tensor, weight: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """Lloyd's iterations from given centroids: final centroids, cluster sizes, weighted sum of cosines."""
    unit = F.normalize(points, dim=1, eps=COSINE_EPS)
    weighted = points * weight.unsqueeze(1)
    labels = torch.full((len(points),), -1, device=points.device)
    size = weight.new_zeros(len(centroids))
    for _ in range(iterations):
        fit, nearest = (unit @ F.normalize(centroids, dim=1, eps=COSINE_EPS).T).max(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        member = F.one_hot(labels, len(centroids)).to(points.dtype)
        size = member.T @ weight
        centroids = (member.T @ weighted) / size.clamp(min=1e-12).unsqueeze(1)
        empty = (size == 0).nonzero().squeeze(1)
        if empty.numel():
            centroids[empty] = points[fit.argsort()[torch.arange(empty.numel(), device=fit.device) % len(points)]]
    return centroids, size, float((fit * weight).sum())


def _plus_plus(unit: Tensor, weight: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds: each next point drawn by weight times its cosine distance to the nearest seed."""

    def draw(mass: Tensor) -> int:
        total = mass.double().cpu().cumsum(0)  # CUDA has no deterministic kernel for it
        point = torch.rand(1, generator=generator, dtype=torch.double).to(total.device) * total[-1]
        return int(torch.searchsorted(total, point).clamp(max=len(mass) - 1))

    chosen = [draw(weight)]
    distance = torch.full((len(unit),), torch.inf, device=unit.device)
    while len(chosen) < num_clusters:
        distance = torch.minimum(distance, (1 - unit @ unit[chosen[-1]]).clamp(min=0))
        mass = weight * distance
        if float(mass.sum()) <= 0:
            mass = weight
        chosen.append(draw(mass))
    return unit[chosen].clone()
