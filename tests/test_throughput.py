"""tests/throughput.txt is what the simulated TCP does today: a change of behaviour is a diff in the same commit."""

import pytest

from tests.simulation import table

LINES = [(kind, name, round_trip) for kind in table.KINDS for name in table.CLIENTS for round_trip in table.ROUND_TRIPS]


@pytest.mark.parametrize(("kind", "name", "round_trip"), LINES)
def test_the_table_is_what_it_says(kind, name, round_trip):
    _, _, section = table.FILE.read_text().partition(f"\n{kind}: {name}\n")
    written = section.splitlines()[1 + table.ROUND_TRIPS.index(round_trip)]
    assert table.line(kind, name, round_trip) == written, f"write it anew with: {table.COMMAND}"


def test_the_table_has_no_more():
    text = table.FILE.read_text()
    assert len(text.splitlines()) == 1 + len(table.KINDS) * len(table.CLIENTS) * (3 + len(table.ROUND_TRIPS))
