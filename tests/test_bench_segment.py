"""The benchmark of single segments still runs on the code as it is."""

from tests.bench import segment
from workers.tcp import arrival
from workers.tcp.connection import Connection


def test_the_bare_connection_is_measured():
    assert segment.text(Connection.segment_arrives, 3) > 0
    assert segment.text(arrival.steps, 3) > 0
    assert segment.acknowledgements(Connection.segment_arrives, 3) > 0


def test_a_worker_is_measured():
    for batch in segment.BATCHES:
        bench = segment.Bench()
        try:
            assert bench.request_and_answer(batch, 3) > 0
        finally:
            bench.close()
        bench = segment.Bench("socks5")
        try:
            assert bench.connection(batch, 3) > 0
        finally:
            bench.close()
