"""Luffy in torchtitan: its exchange behind torchtitan's token dispatcher, seats behind its data loader.

    --override.imports luffy.titan.exchange                      rows once a rank, partial sums back; lossless
    --override.imports 'luffy.titan.exchange={"wire":"int8"}'    the same in few bits
    --override.imports luffy.titan.exchange luffy.titan.seats    sequences beside the experts that they want, as well

docs/torchtitan.md is the guide. They are overrides as torchtitan knows them (torchtitan/overrides/README.md).
"""

from __future__ import annotations

from torch import nn

try:
    from torchtitan.config import override
    from torchtitan.config.override import derive
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, BaseEPTokenDispatcher
except ImportError as error:
    from luffy.errors import UserError

    raise UserError(f"luffy.titan needs torchtitan 0.3 or newer ({error}): pip install 'luffy-moe[titan]'") from error

from luffy.errors import UserError
from luffy.titan.dispatch import LuffyTokenDispatcher, runtimes
from luffy.titan.loader import LOADS_ROWS, BaseDataLoader, SeatedDataLoader
from luffy.train.own_metrics import numbers_of
from luffy.wire_format import parse_wire

__all__ = ["LuffyTokenDispatcher", "SeatedDataLoader", "exchange", "metrics", "seats"]


@override(target=BaseEPTokenDispatcher.Config, description="Luffy: a row a (token, rank), partial sums back.")
def exchange(cfg: BaseEPTokenDispatcher.Config, *, wire: str = "model") -> LuffyTokenDispatcher.Config:
    """Put Luffy's exchange in the place of every MoE layer's all-to-all.

    wire: as `luffy train --wire` takes it: model (lossless), bf16, int8, int4, or by direction. Raises UserError for a
    dispatcher that does more than torchtitan's standard one.
    """
    parse_wire(wire)
    if type(cfg) is not AllToAllTokenDispatcher.Config:
        name = type(cfg).__qualname__.removesuffix(".Config")
        raise UserError(
            f"luffy.titan.exchange takes the place of AllToAllTokenDispatcher, and this model has {name}; build it "
            'with moe_comm_backend="standard" and without quantised experts'
        )
    return derive(cfg, LuffyTokenDispatcher.Config, wire=wire)


@override(target=BaseDataLoader.Config, fqns=["dataloader"], description="Luffy: rows of a batch at their seats.")
def seats(cfg: BaseDataLoader.Config, *, refresh: int = 8) -> SeatedDataLoader.Config:
    """Exchange the batches of the training loader within each expert-parallel group; validation stays as it is.

    refresh: batches between refreshes of what predicts the seats. Raises UserError unless it is a positive integer.
    """
    if not isinstance(refresh, int) or refresh < 1:
        raise UserError(f"luffy.titan.seats: refresh={refresh!r}: give a whole number of batches, 1 or more")
    if not LOADS_ROWS:
        raise UserError(
            "luffy.titan.seats moves rows of a batch, and this torchtitan loads tokens: use torchtitan 0.3.0"
        )
    return derive(cfg, SeatedDataLoader.Config, inner=cfg, refresh=refresh)


def metrics(model: nn.Module | None = None) -> dict[str, float]:
    """What the MoE layers of `model` (None: of this process) have exchanged since the last call: see `luffy.metrics`.

    Raises UserError where no layer has luffy.titan.exchange and an expert-parallel group.
    """
    found = runtimes(None if model is None else model.modules())
    if not found:
        raise UserError("luffy.titan.metrics: no layer here has luffy.titan.exchange and an expert-parallel group")
    return numbers_of(found)
