"""The audit: what condensation costs in accuracy, measured on a few copies that it would have spared.

An audited copy is sent beside its representative, to the same expert, so both answers are at hand in one place. What is
compared is the expert's output, ||E(t) - E(c)|| / ||E(t)|| over all audited copies together; the token uses its own
answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luffy.exchange.condense import Condensed
from luffy.exchange.dispatch import Received

# What `tally` counts: copies before, copies sent, audited copies, and two sums of squares over those.
NUM_COUNTS = 5


@torch.no_grad()
def tally(condensed: Condensed, received: Received, partial: Tensor) -> Tensor:
    """[5]: copies of this rank's tokens, those sent; audited rows that arrived here, their squared error and size."""
    wide = torch.promote_types(partial.dtype, torch.float32)
    out = torch.zeros(NUM_COUNTS, dtype=wide, device=partial.device)
    out[0], out[1] = condensed.copy.sum(), condensed.sent.sum()
    if received.audit is None:
        return out
    yes = received.audit != 0
    row = torch.arange(len(yes), device=yes.device) + received.audit
    own = partial.to(wide)
    out[2] = yes.sum()
    out[3] = ((own - own[row]).square().sum(1) * yes).sum()
    out[4] = (own.square().sum(1) * yes).sum()
    return out
