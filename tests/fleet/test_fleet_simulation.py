"""The simulation of fleets: what its requests and losses add up to, and that the policies make the difference."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fleet
from benchmarks.fleet_master import measure_nodes, measure_streams
from benchmarks.fleet_simulation import VARIANTS, Outcome, Simulation, Variant
from benchmarks.fleet_world import BLOCK_TOKENS, Churn, Happening, make_churn, make_fleet, make_sessions

_OBJECTIVES = (5.0, 0.15)
_SMALL = {"nodes": 12, "minutes": 1.5, "seed": 5, "load": 0.25, "objectives": _OBJECTIVES}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of 12 machines of which each is lost every five minutes."""
    about, found = fleet.simulate(**_SMALL, losses_per_h=12.0, variants=VARIANTS)
    assert about["losses"] > 3
    return {each.variant: each for each in found}


def test_all_requests_are_answered_although_machines_are_lost(outcomes: dict[str, Outcome]) -> None:
    for one in outcomes.values():
        assert one.requests > 50
        assert one.unanswered == 0
        assert one.lost_tokens > 0
        assert one.goodput_tok_s <= one.output_tok_s
        assert one.gap_p50_s <= one.gap_p99_s <= one.longest_pause_s


def test_with_replay_nobody_begins_anew(outcomes: dict[str, Outcome]) -> None:
    for name, one in outcomes.items():
        assert (one.anew > 0) == name.endswith("anew")
    assert outcomes["prefix, replay"].within >= outcomes["prefix, anew"].within


def test_routing_by_prefix_and_load_finds_more_prefixes_and_meets_more_objectives(outcomes: dict[str, Outcome]) -> None:
    ours, theirs = outcomes["prefix, replay"], outcomes["round robin, replay"]
    assert ours.hit_rate > 1.5 * theirs.hit_rate
    assert ours.within > theirs.within
    assert ours.hit_rate > outcomes["load, replay"].hit_rate
    assert outcomes["sticky, replay"].hit_rate > theirs.hit_rate


def test_the_same_seed_is_the_same_run_and_another_one_is_not() -> None:
    def run(seed: int) -> Outcome:
        given = {**_SMALL, "seed": seed, "minutes": 0.5}
        _, (one,) = fleet.simulate(**given, losses_per_h=6.0, variants=VARIANTS[:1])
        return replace(one, wall_s=0.0)

    assert run(1) == run(1) != run(2)


def test_where_no_replica_is_left_requests_wait_for_one() -> None:
    """All machines are lost at once, and come back."""
    nodes = make_fleet(6, random.Random(2))
    rates = fleet.ReplicaRates(fleet.problem_of(fleet.model_8b()), 0.15)
    planned = fleet.partition(nodes, rates)
    sessions = make_sessions(0.5, 30.0, random.Random(3))
    happenings = [Happening(10.0, "leaves", node.name) for node in nodes]
    happenings += [Happening(25.0, "comes", node.name) for node in nodes]
    one = Simulation(nodes, planned, rates, Variant("prefix", True), _OBJECTIVES, 1).run(sessions, happenings, 30.0)
    assert one.requests >= len(sessions)
    assert one.unanswered == 0
    assert one.longest_pause_s > 10 or one.ttft_p99_s > 10


def test_conversations_share_prefixes_with_their_application_and_grow_turn_by_turn() -> None:
    sessions = make_sessions(5.0, 120.0, random.Random(1))
    assert 300 < len(sessions) < 900
    assert [each.at_s for each in sessions] == sorted(each.at_s for each in sessions)
    one = next(each for each in sessions if len(each.turns) > 2 and each.shared > 2 * BLOCK_TOKENS)
    first, second = (one.hashes(one.prompt_tokens(turn)) for turn in (0, 1))
    assert second[: len(first)] == first
    twin = next(each for each in sessions if each is not one and each.application == one.application)
    common = one.shared // BLOCK_TOKENS
    assert one.hashes(9000)[:common] == twin.hashes(9000)[:common]
    assert not set(one.hashes(9000)[common:]) & set(twin.hashes(9000))
    per_second = [0] * 120
    for each in sessions:
        per_second[int(each.at_s)] += 1
    assert max(per_second) > 3 * sum(per_second) / 120  # bursts
    turns = [len(each.turns) for each in sessions]
    answers = [turn.answer for each in sessions for turn in each.turns]
    assert sum(turns) / len(turns) == pytest.approx(fleet.MEAN_TURNS, rel=0.2)
    assert sum(answers) / len(answers) == pytest.approx(fleet.MEAN_ANSWER, rel=0.15)


def test_a_machine_leaves_and_comes_back_in_turn() -> None:
    nodes = make_fleet(50, random.Random(1))
    happenings = make_churn(nodes, Churn(leaves_per_h=20.0), 3600.0, random.Random(2))
    assert [each.at_s for each in happenings] == sorted(each.at_s for each in happenings)
    leaves = [each for each in happenings if each.what == "leaves"]
    assert 300 < len(leaves) < 1000  # away for 4 minutes on the mean, in between at home for 3
    for node in nodes:
        own = [each.what for each in happenings if each.node == node.name and each.what in ("leaves", "comes")]
        assert own == ["leaves", "comes"] * (len(own) // 2) + ["leaves"] * (len(own) % 2)
    assert not make_churn(nodes, Churn(0.0, slows_per_h=0.0), 3600.0, random.Random(2))


def test_the_command_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.json"
    assert fleet.main(["--nodes", "5,6", "--minutes", "0.2", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert [each["nodes"] for each in record["fleets"]] == [5, 6]
    assert [one["variant"] for one in record["fleets"][0]["outcomes"]] == [each.name for each in VARIANTS]
    assert "goodput" in capsys.readouterr().out


def test_what_a_master_costs_is_measured_on_the_real_parts() -> None:
    few, many = measure_streams(2, steps=3), measure_streams(64, steps=3)
    assert min(few.schedule_s, few.encode_s, few.update_s) > 0
    assert many.step_s > few.step_s
    assert measure_nodes(2, seconds=0.1).number == 2
