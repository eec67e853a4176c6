"""torchtitan's own all-to-all, with its rows to other ranks counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import override
from torchtitan.config.override import derive
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher


class CountedDispatcher(AllToAllTokenDispatcher):
    """sent: bytes of the forward pass, of this process; rows that are computed again for the backward pass aside."""

    sent = 0

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def _dispatch_token_exchange(self, rows: Tensor, pg: Any, output_splits: Any, input_splits: Any) -> Tensor:
        self._count(rows, input_splits)
        return super()._dispatch_token_exchange(rows, pg, output_splits, input_splits)

    def _combine_token_exchange(self, rows: Tensor, pg: Any, input_splits: Any, output_splits: Any) -> Tensor:
        self._count(rows, output_splits)
        return super()._combine_token_exchange(rows, pg, input_splits, output_splits)

    def _count(self, rows: Tensor, splits: list[int]) -> None:
        if torch._C._current_graph_task_id() == -1:
            away = sum(splits) - splits[self.ep_mesh.get_local_rank()]
            CountedDispatcher.sent += away * rows.shape[1] * rows.itemsize


@override(target=AllToAllTokenDispatcher.Config)
def counted(cfg: Any) -> Any:
    return derive(cfg, CountedDispatcher.Config)
