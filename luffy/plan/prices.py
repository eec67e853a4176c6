"""Prices of ranks that nearly clear the market, from a few passes over the benefit matrix.

Under fixed quotas, subtracting a price from a whole column of the benefit matrix changes the value of every
assignment by the same amount: prices never change which assignment is best. But at good prices every sequence can
simply take what it likes most and ranks come out nearly full, which is most of the work of assigning. The price at
which exactly quota[j] of the sequences value rank j more is the quota[j]-th largest entry of column j, the
*clearing quantile*.

On clusters of several nodes the columns of one node rise and fall together (they share the node's rows), and column
quantiles clear nothing: at 1024 sequences, 8 nodes of 8 ranks, four in ten sequences still wanted a full rank.
There the market is cleared in two tiers: nodes against nodes, then inside each node the ranks, counting only the
sequences that prefer that node, then nodes again at the new rank prices. That leaves one in ten.

Alternatives measured at 1024 sequences and dropped: no prices (up to 7 times the sequences over quota; a gap of 3%
instead of 0.3% on 8 ranks of unequal popularity); quantiles of a 256-row sample (noise: 0.3-0.6% above the optimum
after two rounds of exchange instead of 0.05-0.2%); eight subgradient steps on the dual after the quantile (40
microseconds each; on 8 nodes a quarter of the sequences stayed over quota); mean plus a common multiple of the standard
deviation (2% above the optimum on 8 ranks of unequal popularity).
"""

import numpy as np

from luffy.plan.traffic import Benefit

_BLOCK = 512


def clearing_prices(benefit: Benefit, quotas: np.ndarray) -> np.ndarray:
    """int32 [N]: prices in units of benefit.values at which about quotas[j] of the S sequences choose rank j."""
    dtype = benefit.values.dtype
    if benefit.two_tier is None:
        return _quantiles(benefit.values.T, quotas).astype(dtype)
    rank_values, node_values = benefit.two_tier
    nodes, width, _ = rank_values.shape
    quotas = quotas.reshape(nodes, width)
    node_quotas = quotas.sum(axis=1)
    best_of_node = rank_values.max(axis=1) + node_values
    best_of_node -= _quantiles(best_of_node, node_quotas).astype(dtype)[:, None]
    favourite = np.ascontiguousarray(best_of_node.T).argmax(axis=1)

    rank_prices = np.zeros((nodes, width, 1), dtype=dtype)
    followers = np.split(np.argsort(favourite, kind="stable"), np.cumsum(np.bincount(favourite, minlength=nodes))[:-1])
    for node, members in enumerate(followers):
        if members.size and node_quotas[node]:
            inside = rank_values[node].take(members, axis=1)
            rank_prices[node, :, 0] = _quantiles(inside, quotas[node], int(node_quotas[node]))
    best_of_node = (rank_values - rank_prices).max(axis=1) + node_values
    return (rank_prices[:, :, 0] + _quantiles(best_of_node, node_quotas)[:, None]).astype(dtype).ravel()


def _quantiles(columns: np.ndarray, quotas: np.ndarray, total: int | None = None) -> np.ndarray:
    """int64 [N]: about the value that a share quotas[j] / total of columns[j] reaches. columns: [N, S]; total: S.

    Averaged over at most two interleaved blocks of up to 512 sequences: partitioning short blocks is several times
    faster than partitioning whole columns, and two of them are nearly as good.
    """
    S = columns.shape[1]
    blocks = min(2, -(-S // _BLOCK))
    stride = -(-S // (_BLOCK * blocks)) * blocks
    size = S // stride
    prices = np.zeros(len(quotas), dtype=np.int64)
    even = int(quotas[0]) if (quotas == quotas[0]).all() else None
    for block in range(blocks):
        sample = np.ascontiguousarray(columns[:, block::stride][:, :size])
        # Only the *values* of a partition are used, here and everywhere: which of two equal entries an argpartition
        # puts first depends on the processor's vector width.
        if even is not None:
            place = size - min(size, max(1, even * size // (total or S)))
            prices += np.partition(sample, place, axis=1)[:, place]
        else:
            places = size - np.clip(quotas * size // (total or S), 1, size)
            prices += np.sort(sample, axis=1)[np.arange(len(places)), places]
    return prices // blocks if blocks > 1 else prices
