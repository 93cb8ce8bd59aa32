"""``run_param_tuner.py --backend ray``: a real Ray on this machine, with the stand-in's runs."""

import os
import signal
import threading
import time

import pytest
from tuner_cases import Tune, Workshop, shop_fixture, tune_fixture  # noqa: F401

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow


def test_ray_leaves_the_same_records_as_processes_of_this_machine(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["crash", "done"], 4: ["refuse"]})
    path = shop.grid(shop.space(topk=[8, 4, 2, 1], seed=1))
    done = tune(path, "--backend", "ray", "--gpu", -1, -1)
    assert done.code == 1, "one is refused"
    assert "3 of 4 runs done, 1 failed, 0 left" in done.out and "    error: the data are not sound" in done.out
    assert sorted((call["who"][0], call["resumed"]) for call in shop.calls()) == [
        (1, False), (2, False), (4, False), (8, False), (8, True),
    ]  # fmt: skip
    assert len(shop.records()) == len(shop.table()) == 3
    shop.plan({})
    here = tune(path)
    assert here.code == 0 and "4 of 4 runs done" in here.out, "the other backend takes them for its own"
    assert len(shop.calls()) == 6


def test_a_signal_reaches_the_runs_of_ray(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["wait", "done"]})
    path = shop.grid(shop.space(topk=[8], seed=1))

    def stop() -> None:
        while not (shop.root / "waiting").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert tune(path, "--backend", "ray").code == 128 + signal.SIGTERM
    assert shop.records() == [] and not list((shop.runs / "grids" / "g").glob("orders*"))
    assert tune(path).code == 0
    assert [call["resumed"] for call in shop.calls()] == [False, True]


def test_a_cluster_that_is_not_there_is_refused(shop: Workshop, tune: Tune) -> None:
    answer = tune(shop.grid(shop.space(topk=[8])), "--backend", "ray", "--address", "127.0.0.1:1")
    assert answer.code == 2 and "no Ray at --address 127.0.0.1:1: [Errno 111] Connection refused" in answer.err
