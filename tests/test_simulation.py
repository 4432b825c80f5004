"""The Connection against a model peer over bad links: every octet is right, every run ends. See tests/simulation/.

SIMULATION_SEEDS in the environment says how many seeds; .ci/run asks for 10,000.
"""

import os

import pytest

from tests.simulation import pair, whole_scenario
from tests.simulation.scenario import run

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "2000"))  #: 10,000 take 40 s of one core
CHUNK = 250
WHOLE_SEEDS = SEEDS // 10  #: of whole workers; 15 ms each


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_octet_arrives_and_every_run_ends(first):
    for seed in range(first, first + CHUNK):
        try:
            run(seed)
        except Exception as error:
            error.add_note(f"with every packet: python -m tests.simulation {seed}")
            raise


@pytest.mark.parametrize("first", range(0, WHOLE_SEEDS, whole_scenario.RUNS))
def test_a_whole_worker_moves_every_octet_and_keeps_no_frame(first):
    shard = whole_scenario.worker_of(first)
    for seed in range(first, first + whole_scenario.RUNS):
        try:
            whole_scenario.run(shard, seed)
        except Exception as error:
            error.add_note(f"with every packet: python -m tests.simulation --worker {seed}")
            raise
    shard.close()


@pytest.mark.parametrize("first", range(0, SEEDS // 5, CHUNK))
def test_the_active_side_and_the_passive_one(first):
    for seed in range(first, first + CHUNK):
        try:
            pair.run(seed)
        except Exception as error:
            error.add_note(f"with every packet: python -m tests.simulation --pair {seed}")
            raise


def test_the_runs_are_deterministic():
    assert [run(seed) for seed in range(20)] == [run(seed) for seed in range(20)]


def test_the_seeds_reach_what_they_are_for():
    results = [run(seed) for seed in range(400)]
    assert sum(result.up >= 30_000 for result in results) > 40
    assert sum(result.down >= 30_000 for result in results) > 40
    assert sum(result.reset for result in results) > 8
    assert sum(result.stranger for result in results) > 20
