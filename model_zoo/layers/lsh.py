"""Locality-sensitive hashing by random hyperplanes: sign codes of item vectors, and how far two codes agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_zoo.layers.attend_items import gathered
from model_zoo.layers.sequence import Sequence

#: bits of a code kept in one int64; their weighted sum is exact in float64
WORD_BITS = 52


class LSH(nn.Module):
    """H hashes of some sign bits each, bit = [x . r > 0]; two vectors collide in a hash if all its bits agree.

    A vector's code is a few integers, the hashes side by side, so it is computed once per distinct item, and comparing
    two codes is an exclusive or. Nothing here passes a gradient.

    Args:
        shape: of the rotations, as in LongCTR's checkpoints: ``(d, bits)``, ``(1, d, bits)`` or ``(1, d, H, hash_bits)``.
        hash_bits: bits per hash, 1 to 52.
        reuse_hash: the rotations drawn at construction serve every forward. Otherwise each training forward draws its
            own, one for the batch, from torch's global generator; evaluation always uses the fixed ones, so it repeats.
        hash_seed: of the fixed rotations: blocks of one seed hash alike.
        longctr_compat: LongCTR's ``reuse_hash: False``: fresh rotations in evaluation too, so that ``torch.manual_seed``
            before a forward gives its predictions; with a leading 1 in ``shape``, rotations for each row of the batch.

    Raises:
        ValueError: ``hash_bits`` out of range.

    Source: Charikar, STOC 2002; as used by ETA (arXiv 2108.04468), SDIM (arXiv 2205.10249), MIRRN (arXiv 2411.15005).
    """

    random_rotations: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        hash_bits: int,
        reuse_hash: bool = True,
        hash_seed: int = 0,
        longctr_compat: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= hash_bits <= WORD_BITS:
            raise ValueError(f"hash_bits must lie in 1..{WORD_BITS}, not {hash_bits}")
        rotations = torch.randn(shape, generator=torch.Generator().manual_seed(hash_seed))
        self.register_buffer("random_rotations", rotations)
        by_row = len(shape) > 2
        self.item_dim = shape[1] if by_row else shape[0]
        self.num_hashes = rotations.numel() // self.item_dim // hash_bits
        self.hash_bits = hash_bits
        self.hashes_per_word = WORD_BITS // hash_bits
        self.reuse_hash = reuse_hash
        self.draws_by_row = longctr_compat and by_row
        self.draws_in_evaluation = longctr_compat

    def rotations(self, batch: int) -> Tensor:
        """This forward's rotations, ``[d, bits]``, or ``[B, d, bits]`` where every row has its own."""
        fixed = self.random_rotations
        shape = (self.item_dim, self.num_hashes * self.hash_bits)
        if self.reuse_hash or not (self.training or self.draws_in_evaluation):
            return fixed.reshape(shape)
        if not self.draws_by_row:
            return torch.randn(fixed.shape, device=fixed.device, dtype=fixed.dtype).reshape(shape)
        drawn = torch.randn(batch, *fixed.shape[1:], device=fixed.device, dtype=fixed.dtype)
        return drawn.reshape(batch, *shape)

    @torch.no_grad()
    def rotate(self, vectors: Tensor, rotations: Tensor) -> Tensor:
        """``vectors [..., d] @ rotations [..., d, bits]``, in single precision at least: rounding would turn signs."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors if vectors.dtype == torch.double else vectors.float()
            return vectors @ rotations.to(vectors.dtype)

    @torch.no_grad()
    def codes(self, rotated: Tensor) -> Tensor:
        """Signs ``[..., bits]`` packed into integers, int64 ``[..., W]``."""
        bit = torch.arange(rotated.shape[-1], device=rotated.device)
        hashing, place = bit // self.hash_bits, bit % self.hash_bits
        place = place + hashing % self.hashes_per_word * self.hash_bits
        words = torch.arange(-(-self.num_hashes // self.hashes_per_word), device=rotated.device)
        weights = (hashing.unsqueeze(1) // self.hashes_per_word == words) * 2.0 ** place.double().unsqueeze(1)
        return ((rotated > 0).double() @ weights.double()).long()

    @torch.no_grad()
    def bucket_table(self, vectors: Tensor) -> Tensor:
        """Each vector's bucket in each hash as ones among zeros, ``[N, d] -> [N, H 2^hash_bits]``, by `random_rotations`.

        The product of two rows is the number of hashes in which they collide.
        """
        rotated = self.rotate(vectors, self.random_rotations.reshape(self.item_dim, -1))
        place = 2.0 ** torch.arange(self.hash_bits, device=vectors.device)
        bucket = ((rotated > 0).float().unflatten(1, (self.num_hashes, self.hash_bits)) @ place).long()
        bucket += torch.arange(self.num_hashes, device=vectors.device) << self.hash_bits
        return vectors.new_zeros(len(vectors), self.num_hashes << self.hash_bits).scatter_(1, bucket, 1.0)

    @torch.no_grad()
    def hashed(self, query: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of targets and tokens under this forward's rotations.

        Args:
            query: ``[B, d]``.
            sequence: histories.

        Returns:
            ``(codes of the targets [B, W], codes of tokens [N, W], index [B, T] of each position's token)``: the tokens
            are the sequence's items, or its positions if every row has rotations of its own.
        """
        batch, length = sequence.index.shape
        rotations = self.rotations(batch)
        if rotations.dim() == 2:
            return self.codes(self.rotate(query, rotations)), self._item_codes(sequence, rotations), sequence.index
        target = self.codes(self.rotate(query.unsqueeze(1), rotations)).squeeze(1)
        tokens = torch.empty(batch, length, target.shape[1], dtype=torch.int64, device=query.device)
        for rows, vectors in gathered(sequence.items, sequence.index):
            tokens[rows] = self.codes(self.rotate(vectors, rotations[rows]))
        return target, tokens.flatten(0, 1), torch.arange(batch * length, device=query.device).view(batch, length)

    def _item_codes(self, sequence: Sequence, rotations: Tensor) -> Tensor:
        """Codes ``[U, W]`` of a batch's items; experts whose rotations are the same share them."""
        known = sequence.memo.setdefault("lsh", [])
        for others, hash_bits, codes in known:
            if hash_bits == self.hash_bits and torch.equal(others, rotations):
                return codes
        codes = self.codes(self.rotate(sequence.items, rotations))
        known.append((rotations.clone(), self.hash_bits, codes))
        return codes

    @torch.no_grad()
    def mismatches(self, target: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """In how many hashes each position differs from its row's target; for hashes of one bit the Hamming distance.

        Args:
            target: codes ``[B, W]``.
            tokens: codes ``[N, W]``.
            index: ``[B, T]`` rows of ``tokens``.

        Returns:
            int64 ``[B, T]``, 0 to H.
        """
        counts = torch.empty(index.shape, dtype=torch.int64, device=index.device)
        lowest = sum(1 << number * self.hash_bits for number in range(self.hashes_per_word))
        for rows, words in gathered(tokens, index):  # [r, T, W]
            words ^= target[rows].unsqueeze(1)
            folded = 1  # a hash differs if any of its bits does: its lowest bit takes in as many more as it has
            while folded < self.hash_bits:
                step = min(folded, self.hash_bits - folded)
                words |= words >> step
                folded += step
            words &= lowest
            torch.sum(self._count_hashes(words, lowest), -1, out=counts[rows])
        return counts

    def _count_hashes(self, words: Tensor, lowest: int) -> Tensor:
        """How many of the hashes' lowest bits, all that may be set, are set in each word, in place."""
        if self.hashes_per_word >> self.hash_bits:
            return _count_ones(words)
        words *= lowest  # a hash's bits can hold the sum of all: the product's highest hash does
        words >>= (self.hashes_per_word - 1) * self.hash_bits
        words &= (1 << self.hash_bits) - 1
        return words

    @torch.no_grad()
    def collisions(self, target: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """Which positions collide with their row's target in each hash, bool ``[B, H, T]``; arguments as `mismatches`."""
        found = torch.empty(index.shape[0], self.num_hashes, index.shape[1], dtype=torch.bool, device=index.device)
        shift = torch.arange(self.hashes_per_word, device=index.device) * self.hash_bits
        for rows, words in gathered(tokens, index):
            words ^= target[rows].unsqueeze(1)
            fields = words.unsqueeze(-1) >> shift & (1 << self.hash_bits) - 1  # [r, T, W, hashes of a word]
            found[rows] = (fields.flatten(2)[..., : self.num_hashes] == 0).transpose(1, 2)
        return found


def _count_ones(words: Tensor) -> Tensor:
    """Number of one bits of each non-negative int64, in place: sums of neighbours, by twos, fours, then all bytes."""
    words -= words >> 1 & 0x5555555555555555
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words += words >> 4
    words &= 0x0F0F0F0F0F0F0F0F
    words *= 0x0101010101010101
    return words >> 56
