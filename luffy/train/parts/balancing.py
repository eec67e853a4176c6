"""Loss-free balancing as a part: the bias of the choice follows the load of the whole step (luffy.model.balancing)."""

from __future__ import annotations

from torch import nn

from luffy.comm import Comm
from luffy.model.balancing import LossFreeBias
from luffy.train.parts import Done, Stateless


class Balancing(Stateless):
    name = "balancing"

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        self.bias = LossFreeBias(model, comm)

    def after(self, step: int, done: Done) -> None:
        if done.skipped:
            self.bias.forget()
        else:
            self.bias.step()
