"""Made-up routing counts with the locality that trained models show: for tests and benchmarks, never for claims.

Every sequence has a favourite rank that serves about `favourite_share` of its expert choices (measured on trained
models: 0.15 to 0.34, early in training up to 0.40); the rest spread by a Dirichlet draw around the mix of the
sequence's *domain*, so that sequences of a domain compete for the same ranks; and ranks may be unequally popular.
"""

import numpy as np


def synthetic_counts(
    num_sequences: int,
    num_ranks: int,
    *,
    seed: int = 0,
    length: int = 1024,
    top_k: int = 2,
    num_domains: int = 8,
    favourite_share: tuple[float, float] = (0.25, 0.4),
    popularity: float = 0.3,
) -> np.ndarray:
    """int64 [S, N]: tokens of each sequence with at least one of top_k choices on each rank.

    num_domains 0: no domains, the rest of each sequence's choices is spread at random. popularity: standard deviation
    of the log popularity of ranks. The same arguments give the same counts.
    """
    S, N = num_sequences, num_ranks
    rng = np.random.default_rng(seed)
    popular = np.exp(rng.normal(0.0, popularity, N))
    spread = np.full((S, N), 0.5)
    if num_domains:
        mix = rng.dirichlet(np.full(N, 0.3), num_domains)
        spread = 20 * mix[rng.integers(0, num_domains, S)] + 0.1
    share = (rng.standard_gamma(spread) + 1e-6) * popular
    share /= share.sum(axis=1, keepdims=True)
    everyone = np.arange(S)
    # A sequence's favourite is drawn from its own mix: sequences of one domain crowd the same ranks.
    favourite = (share.cumsum(axis=1) > rng.random((S, 1))).argmax(axis=1)
    wanted = rng.uniform(*favourite_share, S)
    share *= ((1 - wanted) / np.maximum(1e-9, 1 - share[everyone, favourite]))[:, None]
    share[everyone, favourite] = wanted
    return rng.binomial(length, np.clip(1 - (1 - share) ** top_k, 0, 1)).astype(np.int64)
