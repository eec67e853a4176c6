"""A script that ends while a thread of gloo still has Python to run ends with its own status, not by SIGABRT."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from luffy.comm import ending

ROOT = Path(__file__).resolve().parents[2]
# The other rank comes late, and the interpreter of this one takes a second to shut down.
SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
from luffy.comm import TrafficMeter

other = os.fork() == 0
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(other), world_size=2)
if other:
    time.sleep(0.5)
    dist.all_reduce(torch.ones(8))
    os._exit(0)

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(1.0)

late = Late()
TrafficMeter(0, [0, 0]).watch(dist.all_reduce(torch.ones(8), async_op=True))
sys.exit(3)
"""


def test_a_process_waits_for_the_backends_threads(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 3, (done.returncode, done.stderr)
    assert not done.stderr


def test_what_never_comes_is_not_waited_for_long(monkeypatch) -> None:
    monkeypatch.setattr(ending, "PATIENCE", 0.1)
    monkeypatch.setattr(ending, "_attached", 1)
    begin = time.monotonic()
    ending.settle()
    assert 0.1 <= time.monotonic() - begin < 2
