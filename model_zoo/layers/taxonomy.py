"""Themes guided by a given taxonomy of the items: codes that start from categories, and a term that keeps h(x) near."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.layers.routers import ThemeRouter, occurrences
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.theme_codebook import ThemeCodebook, cosine_kmeans
from model_zoo.layers.windows import CATEGORY, Windows


class Taxonomy(nn.Module):
    """Which themes stand for each category.

    A token's category is its item's, a window's the one that most of its items have; 0 = none. The table is empty until
    `start` or `follow`, and does not change afterwards.

    Args:
        num_categories: C, one more than the largest category.
        num_themes: n.

    Attributes:
        themes: ``[C, n]`` bool.
    """

    themes: Tensor

    def __init__(self, num_categories: int, num_themes: int) -> None:
        super().__init__()
        self.register_buffer("themes", torch.zeros(num_categories, num_themes, dtype=torch.bool))

    @torch.no_grad()
    def start(self, codebook: ThemeCodebook, hidden: Tensor, weight: Tensor, category: Tensor, seed: int) -> Tensor:
        """Start the codes from the categories' centroids, the weighted means of their tokens' h(x).

        With more categories than themes, the centroids are grouped by `cosine_kmeans`, each weighing as much as its
        tokens. With fewer, every category has a theme, and each theme left goes to the category that then has the most
        tokens a theme; the tokens of a category with several are divided by `cosine_kmeans`.

        Args:
            hidden: ``[N, D]`` tokens' router vectors.
            weight: ``[N]`` occurrences, > 0.
            category: ``[N]`` int64.
            seed: of k-means.

        Returns:
            ``[n]`` tokens of each theme, falling; none (``[0]``) and nothing done if no token has a category.
        """
        known, centroids, mass = category_centroids(hidden, weight, category)
        count = codebook.num_themes
        if len(known) == 0:
            return mass
        if len(known) > count:
            codes, sizes = cosine_kmeans(centroids, mass, count, seed)
            owner = (F.normalize(centroids, dim=1) @ F.normalize(codes, dim=1).T).argmax(1)  # [K]
            pairs = torch.stack([known, owner])
        else:
            shares = torch.ones_like(known)
            for _ in range(count - len(known)):
                shares[(mass / shares).argmax()] += 1
            parts = []
            for number, themes in zip(known, shares.tolist(), strict=True):
                mine = category == number
                parts.append(cosine_kmeans(hidden[mine], weight[mine], themes, seed))
            codes, sizes = (torch.cat(side) for side in zip(*parts, strict=True))
            order = sizes.argsort(descending=True, stable=True)
            codes, sizes = codes[order], sizes[order]
            pairs = torch.stack([known.repeat_interleave(shares)[order], torch.arange(count, device=order.device)])
        codebook.start_from(codes, sizes)
        self._stand_for(pairs)
        return sizes

    @torch.no_grad()
    def follow(self, codebook: ThemeCodebook, hidden: Tensor, weight: Tensor, category: Tensor) -> None:
        """Let each category have the theme nearest its centroid; arguments as for `start`."""
        known, centroids, _ = category_centroids(hidden, weight, category)
        self._stand_for(torch.stack([known, codebook.nearest(centroids, 1).squeeze(1)]))

    def penalty(self, router: ThemeRouter, tokens: Sequence | Windows) -> Tensor:
        """How far tokens are from their categories' themes.

        The mean of ``1 - max_i cos(h(x), sg(W_i))``, i over the themes of x's category, over the occurrences of tokens
        whose category has a theme; 0 without such a token. 0 at best, 2 at worst.
        """
        category = tokens.category if isinstance(tokens, Windows) else tokens.memo.get(CATEGORY)
        assert category is not None
        allowed = self.themes[category]  # [U, n]
        cosine = router.codebook.cosine(router.encode_tokens(tokens), fixed=True)
        nearest = cosine.masked_fill(~allowed, -2.0).amax(1)  # -2: below every cosine
        weight = (occurrences(tokens) * allowed.any(1)).to(cosine.dtype)
        return ((1 - nearest) * weight).sum() / weight.sum().clamp(min=1)

    def _stand_for(self, pairs: Tensor) -> None:
        """Fill the table from categories and themes ``[2, P]``."""
        self.themes.zero_()
        self.themes[pairs[0], pairs[1]] = True


def category_centroids(hidden: Tensor, weight: Tensor, category: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The K categories above 0 that occur, and their tokens' weighted means and weights.

    Args:
        hidden: ``[N, D]``.
        weight: ``[N]``, > 0.
        category: ``[N]`` int64.

    Returns:
        Rising categories ``[K]``, float32 means ``[K, D]`` and weights ``[K]``.
    """
    hidden, weight = hidden.float(), weight.float()
    kept = (category > 0).nonzero().squeeze(1)
    order = kept[category[kept].argsort(stable=True)]
    known, counts = torch.unique_consecutive(category[order], return_counts=True)
    if len(known) == 0:
        return known, hidden.new_zeros(0, hidden.shape[1]), hidden.new_zeros(0)
    first = counts.cumsum(0) - counts
    total = F.embedding_bag(order, hidden, first, mode="sum", per_sample_weights=weight[order])
    mass = F.embedding_bag(order, weight.unsqueeze(1), first, mode="sum").squeeze(1)
    return known, total / mass.unsqueeze(1), mass
