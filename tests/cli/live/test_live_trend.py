"""Rates and shares from counters that are looked at now and then."""

from __future__ import annotations

import pytest

from scripts.captures import Terminal
from vramancer.cli.bars import glyphs_for
from vramancer.cli.live.answers import Batcher, Pipeline, Quantiles, Queue, Stage
from vramancer.cli.live.figures import percent, quantiles, rate, share_bar, sparkline
from vramancer.cli.live.look import Look
from vramancer.cli.live.trend import KEPT_S, LATELY_S, Lately, Trend, rates

GLYPHS = glyphs_for(Terminal(80).console())


def look(at_s: float, tokens: int = 0, stages: tuple[Stage, ...] = ()) -> Look:
    return Look("http://here:1", at_s, Pipeline(True, "ready", stages=stages), Queue(0, 0), Batcher(tokens))


def after(*looks: Look) -> Lately:
    trend = Trend()
    for each in looks:
        lately = trend.add(each)
    return lately


def stage(busy_s: float, predicted_s: float | None = None, *, index: int = 0, device: str = "cuda:0") -> Stage:
    return Stage(device, (0, 3), index, busy_seconds=busy_s, predicted_seconds=predicted_s)


def test_nothing_is_known_at_the_first_look() -> None:
    lately = after(look(10.0, 500, (stage(3.0),)))
    assert (lately.tokens_per_second, lately.busy, lately.predicted) == (None, None, None)
    assert lately.points == ((10.0, 0.0),)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    looks = [look(float(second), 100 * second) for second in range(10)]
    looks += [look(9.0 + second, 900 + 20 * second) for second in range(1, 8)]
    assert after(*looks[:10]).tokens_per_second == pytest.approx(100.0)
    assert after(*looks).tokens_per_second == pytest.approx(20.0)
    assert after(*looks[:12]).tokens_per_second == pytest.approx((3 * 100 + 2 * 20) / LATELY_S)


def test_looks_further_apart_than_that_are_compared_with_each_other() -> None:
    assert after(look(0.0), look(60.0, 600), look(120.0, 1800)).tokens_per_second == pytest.approx(20.0)


def test_a_server_that_starts_again_counts_from_nothing() -> None:
    lately = after(look(0.0, 1000), look(1.0, 1010), look(2.0, 30))
    assert [tokens for _, tokens in lately.points] == [0, 10, 40]
    assert lately.tokens_per_second == pytest.approx(20.0)


def test_old_points_are_forgotten() -> None:
    trend = Trend()
    for second in range(int(KEPT_S) + 50):
        lately = trend.add(look(float(second), second))
    assert KEPT_S <= lately.points[-1][0] - lately.points[0][0] <= KEPT_S + 1


def test_how_busy_stages_were_lately() -> None:
    looks = [look(float(s), 0, (stage(100 + 0.25 * s, 7 + 0.5 * s), stage(9.0, None, index=1))) for s in range(20)]
    lately = after(*looks)
    assert lately.busy == pytest.approx({0: 0.25, 1: 0.0})
    assert lately.predicted == pytest.approx({0: 0.5})
    busier = [look(19.0 + s, 0, (stage(104.75 + 1.1 * s, 16.5), stage(9.0, None, index=1))) for s in range(1, 6)]
    assert after(*looks, *busier).busy == pytest.approx({0: 1.0, 1: 0.0}), "what ends late is counted late"


@pytest.mark.parametrize(
    "other", [stage(2.0), stage(9.0, device="cuda:1"), Stage("cuda:0", (0, 2), 0, busy_seconds=9.0)]
)
def test_stages_that_have_moved_or_start_again_are_others(other: Stage) -> None:
    assert after(look(0.0, 0, (stage(5.0),)), look(1.0, 0, (other,))).busy is None
    assert after(look(0.0, 0, (stage(5.0),)), look(1.0, 0, (other, other))).busy is None


def test_cells_of_the_last_minutes() -> None:
    points = ((2.0, 0.0), (7.0, 50.0), (12.0, 50.0), (17.0, 150.0))
    assert rates(points, 5, 5.0) == [None, pytest.approx(10.0), pytest.approx(4.0), pytest.approx(12.0), 20.0]
    moved = rates((*points, (18.0, 150.0)), 5, 5.0)
    assert moved[:4] == rates(points, 5, 5.0)[:4], "what is over stays as it is"
    assert moved[4] == pytest.approx(40 / 3)
    assert rates((), 3, 5.0) == [None] * 3
    assert rates(((2.0, 0.0),), 2, 5.0) == [None, None]


def test_a_gap_between_looks_is_filled_evenly() -> None:
    assert rates(((0.0, 0.0), (20.0, 100.0)), 4, 5.0) == [5.0, 5.0, 5.0, None]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_a_line_of_columns() -> None:
    assert sparkline([None, 0.0, 1.0, 4.0, 8.0], GLYPHS).plain == " ▁▂▅█"
    assert sparkline([0.0, None], GLYPHS).plain == "▁ "
    assert sparkline([], GLYPHS).plain == ""


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Quantiles(9, 0.0143, 0.0181, 0.0246), "14 18 25 ms"),
        (Quantiles(9, 0.0012, 0.0181, 0.999), "1.2 18 999 ms"),
        (Quantiles(9, 0.214, 0.87, 1.0), "0.21 0.87 1.0 s"),
        (Quantiles(9, 4.31, 18.6, 412.0), "4.3 19 412 s"),
        (Quantiles(1, 2.0), "2.0 - - s"),
        (Quantiles(), "-"),
        (None, "-"),
    ],
)
def test_quantiles_have_one_unit(found: Quantiles | None, text: str) -> None:
    assert quantiles(found) == text


def test_shares() -> None:
    assert [percent(share) for share in (None, 0.0, 0.005, 1.0)] == ["-", "0%", "0%", "100%"]
    assert [share_bar(share, 4, GLYPHS).plain for share in (0.0, 0.5, 1.0, 7.0)] == ["····", "▓▓··", "▓▓▓▓", "▓▓▓▓"]
    assert [rate(each) for each in (0.0, 71.44, 12345.6)] == ["0.0", "71.4", "12346"]
