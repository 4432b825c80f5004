"""A deterministic simulation: the real Connection against a model peer over seeded links, in virtual time.

    Peer (a TCP of the test's own) ── Link: loss, delay, reordering, duplication … ── Gateway (Connection + relay)

Every octet is a function of its position, so both sides check each one that they get. A run ends when both ends are
done and nothing is on the way; what is still armed or kept then is an error.

With --worker a whole Worker stands there, with frames, flows, relays and timers (whole_worker.py), with --stranger
somebody attacks it (stranger.py), with --pair both ends are real, and the active side is one of them (pair.py).

    python -m tests.simulation [--KIND] FIRST LAST      run seeds, print those that fail
    python -m tests.simulation [--KIND] SEED            run one, and print every packet
    python -m tests.simulation --table                  measure throughput over loss and delay (table.py)
"""
