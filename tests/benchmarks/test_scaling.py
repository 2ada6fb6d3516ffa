"""The simulation of many servers: against sums that can be done by hand, and for what must hold of any queue."""

import pytest

from benchmarks.scaling.calibration import MEASURING_PASSES, Calibration
from benchmarks.scaling.fleet import ROUTES, Load, least_loaded, simulate
from benchmarks.scaling.replica import SMOLLM2, Limits, ServiceTimes

TIMES = ServiceTimes(prompt_token=0.001, step=0.01, row=0.002)


def test_lines_go_through_the_measured_points() -> None:
    assert 256 * SMOLLM2.prompt_token == pytest.approx(0.324)
    assert SMOLLM2.step + SMOLLM2.row == pytest.approx(0.0129)
    assert SMOLLM2.step + 8 * SMOLLM2.row == pytest.approx(0.0343)


def test_one_client_gets_what_the_calls_take() -> None:
    """Lengths vary, but their sums are known: a prompt token costs 1 ms, a generated one 12 ms."""
    load = Load(beginnings=1, shared=0, own=100, answer=50)
    found = simulate(1, load, least_loaded, 200, clients=1, times=TIMES, limits=Limits(budget=1000))
    assert found.tokens == pytest.approx(50 / (0.1 + 50 * 0.012), rel=0.05)
    assert found.each[0] == pytest.approx(0.012)
    assert found.first[0] == pytest.approx(0.112, rel=0.1)
    assert found.busy == pytest.approx(1)


def test_rows_share_a_step() -> None:
    load = Load(beginnings=1, shared=0, own=1, answer=500)
    found = simulate(1, load, least_loaded, 120, clients=8, times=TIMES)
    assert found.tokens == pytest.approx(8 / (0.01 + 8 * 0.002), rel=0.02)


def test_what_comes_in_goes_out_while_there_is_room() -> None:
    load = Load(rate=0.5, answer=40)
    found = simulate(20, load, ROUTES["least"], 120)
    assert found.tokens == pytest.approx(0.5 * 40, rel=0.1)
    assert found.cost(0.1) == pytest.approx(0.1 / (found.tokens * 3600) * 1e6)


def test_routes_by_prefix_read_less_and_chance_waits_longest() -> None:
    found = {name: simulate(16, Load(rate=0.8), route, 60) for name, route in ROUTES.items()}
    assert found["prefix"].hits > found["random"].hits + 0.2
    assert found["prefix"].busy < found["random"].busy
    assert found["prefix"].first[0] < found["random"].first[0]
    assert found["least"].first[1] < found["random"].first[1]


def test_only_the_measurement_is_spread() -> None:
    alone = Calibration(layers=80, parameters=70e9, windows=128)
    assert alone.spread(1) == pytest.approx(MEASURING_PASSES * 128 * alone.window)
    assert alone.spread(128) == pytest.approx(alone.spread(1) / 128)
    assert alone.spread(1000) == alone.spread(128)
    assert alone.seconds(128, 1) > alone.search
