"""One thread a process, so that forked ranks share the cores fairly and sums keep their order."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# The time of one example depends on what else the machine does; that says nothing about the code.
settings.register_profile("luffy", deadline=None)
settings.load_profile("luffy")
