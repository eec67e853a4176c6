"""The parts of watching over a run that need no ranks: whereabouts, stragglers, restarts, requests to stop."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import distributed_c10d

from luffy.comm.meter import TrafficMeter
from luffy.errors import StoppedError
from luffy.train import stopping
from luffy.train.options import TrainOptions
from luffy.train.restart import Restarts
from luffy.train.scratch import get_scratch
from luffy.train.stragglers import WINDOW, Stragglers, busy_seconds
from luffy.train.supervise import Attempt, Requests
from luffy.train.whereabouts import whereabouts


def _in_a_collective(entered, lock):
    """Wait in an all-reduce for ever: its function comes from torch's own file."""
    scope = {"entered": entered, "lock": lock}
    source = "def all_reduce():\n    entered.set()\n    lock.acquire()\n"
    exec(compile(source, distributed_c10d.__file__, "exec"), scope)
    scope["all_reduce"]()


def test_whereabouts_name_the_collective_and_change_with_every_move():
    entered, lock = threading.Event(), threading.Lock()
    lock.acquire()
    thread = threading.Thread(target=_in_a_collective, args=(entered, lock))
    thread.start()
    entered.wait(10)
    time.sleep(0.2)
    first, second = whereabouts(thread.ident), whereabouts(thread.ident)
    TrafficMeter(0, (0, 0)).send("dispatch", 1, 8)
    third, here = whereabouts(thread.ident), whereabouts(threading.get_ident())
    lock.release()
    thread.join()
    assert first.waiting and first.phrase.startswith("all_reduce")
    assert first == second and third.key != second.key
    assert not here.waiting


def test_a_straggler_is_told_of_once_and_only_if_it_is_the_same_rank_step_after_step():
    assert busy_seconds({"attention": 1.0, "experts": 2.0, "exchange": 5.0, "gradients": 7.0, "other": 0.5}) == 3.5
    steady, told = Stragglers(), []
    for _ in range(2 * WINDOW):
        entry, warning = steady.read([1.0, 1.0, 1.5, 1.0], 2.0)
        told.append(warning)
    assert entry == {"slowest": {"rank": 2, "waited_for_share": 0.25}}
    assert [w for w in told if w] == ["rank 2 is a straggler: in 20 steps the others waited for it 25% of the time"]
    changing = Stragglers()
    for step in range(3 * WINDOW):
        busy = [1.0] * 4
        busy[step % 4] = 1.5
        assert changing.read(busy, 2.0)[1] is None
    assert all(Stragglers().read([1.0, 1.02], 2.0)[1] is None for _ in range(WINDOW))
    assert Stragglers().read([1.0], 2.0) == ({}, None)


def test_restarts_take_fewer_ranks_only_where_the_same_number_came_to_nothing(small, tmp_path, capfd):
    options = TrainOptions(**small(ranks=4, max_restarts=4, min_ranks=1))
    restarts = Restarts(options)

    def saves(step):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")

    saves(3)
    assert restarts(0, 4, "rank 1 was lost") == ((options,), 4)
    assert restarts(1, 4, "rank 1 was lost") == ((options,), 4)
    assert restarts(2, 4, "rank 1 was lost") == ((options,), 2)  # 3 does not divide the experts
    saves(6)
    assert restarts(3, 2, "rank 1 was lost") == ((options,), 2)
    assert restarts(4, 2, "rank 1 was lost") is None
    assert "restart 3 of 4, on 2 ranks, from step-00000003" in capfd.readouterr().err
    assert Restarts(TrainOptions(**small(ranks=4, max_restarts=9))).fewer(4) == 4


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping._requested = 0


def test_a_request_waits_for_the_end_of_the_step_and_ends_at_once_elsewhere(handlers):
    stopping.install()
    with pytest.raises(StoppedError) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.status == 143
    stopping.install()
    with stopping.at_step_ends():
        os.kill(os.getpid(), signal.SIGUSR1)
        threading.Event().wait(0.05)
        assert stopping.requested() == signal.SIGUSR1
    with pytest.raises(StoppedError, match="before its first step"), stopping.at_step_ends():
        pass


def test_a_second_ctrl_c_means_at_once_and_a_second_sigterm_does_not():
    requests = Requests()
    requests.note(signal.SIGTERM, None)
    requests.note(signal.SIGTERM, None)
    assert requests.number == signal.SIGTERM and not requests.at_once
    impatient = Requests()
    impatient.note(signal.SIGINT, None)
    assert not impatient.at_once
    impatient.note(signal.SIGINT, None)
    assert impatient.at_once


def _ends_at_once(work, args, folder, launcher):
    assert not list(Path(folder).iterdir())
    Path(folder, "was-here").touch()


@pytest.mark.slow
def test_a_port_that_comes_again_is_no_matter():
    for _ in range(2):
        Attempt(_ends_at_once, None, (), 1, 0, get_scratch(), 4711, Requests()).run()
