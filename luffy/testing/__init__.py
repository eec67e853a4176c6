"""Real ranks for tests, and the slow dense oracle that exactness is measured against."""

from luffy.testing.oracle import Condensing, OracleOutput
from luffy.testing.oracle_tools import (
    gather_full,
    largest_error,
    load_full,
    random_sequences,
    relative_error,
    vivid_parameters,
)
from luffy.testing.oracle_train import OracleStep, oracle_step, oracle_train
from luffy.testing.ranks import Outcome, RankFailedError, run_ranks, run_together

__all__ = [
    "Condensing",
    "OracleOutput",
    "OracleStep",
    "Outcome",
    "RankFailedError",
    "gather_full",
    "largest_error",
    "load_full",
    "oracle_step",
    "oracle_train",
    "random_sequences",
    "relative_error",
    "run_ranks",
    "run_together",
    "vivid_parameters",
]
