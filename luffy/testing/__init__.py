"""Real ranks for tests, and the slow dense oracle that exactness is measured against."""

from luffy.testing.ranks import RankFailedError, run_ranks

__all__ = ["RankFailedError", "run_ranks"]
