"""UDP through the gateway: echo, sizes, USO both ways, full cone, idle timeout, ping of our own addresses."""

import os
import re
import select
import socket
import struct
import time
from contextlib import ExitStack
from typing import Final

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.link import B4 as LINK_NET4
from tests.netns.link import Link
from tests.netns.peers import EMBEDDED, RunningPeer
from tests.netns.stage import Stage
from tests.netns.traffic import SO_RCVBUFFORCE, UdpTarget, family_of, target_address, udp_echo
from tests.netns.world import NO_ROUTE4, TARGET4, World, eventually

pytestmark = pytest.mark.netns
SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103  # linux/udp.h; Python has no constant for it
UDP_GRO: Final = 104
OWN = ("198.18.0.2", "fd72:6e67:7761:7900::2")


@pytest.mark.parametrize(("version", "size"), [(4, 1), (4, 1472), (6, 1), (6, 64), (6, 1452)])
def test_echo_up_to_the_mtu(stage: Stage, version: int, size: int) -> None:
    udp_echo(stage.world.gw, target_address(version), stage.udp(version).port, os.urandom(size))


@pytest.mark.parametrize(("version", "size"), [(4, 1473), (4, 8000), (6, 1453), (6, 8000), (4, 65_497), (6, 65_485)])
def test_echo_beyond_the_mtu(stage: Stage, version: int, size: int) -> None:
    """Datagrams come as IP fragments in both directions."""
    udp_echo(stage.world.gw, target_address(version), stage.udp(version).port, os.urandom(size), timeout=2)


@pytest.mark.parametrize("own", ["198.18.0.2", "fd72:6e67:7761:7900::2"])
def test_ping_in_fragments(stage: Stage, own: str) -> None:
    assert stage.world.gw.run(["ping", "-c", "1", "-s", "4000", "-W", "1", own]).returncode == 0


@pytest.mark.parametrize("version", [4, 6])
def test_many_datagrams_of_one_client_arrive_in_order(stage: Stage, version: int) -> None:
    with stage.world.gw.socket(family_of(target_address(version)), socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.connect((target_address(version), stage.udp(version).port))
        # 32 under way at a time: fewer than any buffer between here and there holds.
        for batch in range(30):
            for which in range(32):
                client.send(struct.pack(">I", batch * 32 + which) + b"." * 60)
            got = [struct.unpack(">I", client.recv(2048)[:4])[0] for _ in range(32)]
            assert got == list(range(batch * 32, batch * 32 + 32))


@pytest.mark.parametrize("version", [4, 6])
def test_segmented_sends_and_coalesced_receives(stage: Stage, version: int) -> None:
    """A UDP_SEGMENT super-datagram goes in, each datagram comes out by itself; answers may come coalesced (UDP_GRO)."""
    size, count = 512, 40
    payload = b"".join(struct.pack(">I", which) + bytes(size - 4) for which in range(count))
    with stage.world.gw.socket(family_of(target_address(version)), socket.SOCK_DGRAM) as client:
        client.setsockopt(SOL_UDP, UDP_GRO, 1)
        client.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 20)
        client.settimeout(3)
        client.connect((target_address(version), stage.udp(version).port))
        client.sendmsg([payload], [(SOL_UDP, UDP_SEGMENT, struct.pack("H", size))])
        received: list[int] = []
        while len(received) < count:
            data, ancillary, _, _ = client.recvmsg(65536, 64)
            segment = size
            for level, kind, value in ancillary:
                if (level, kind) == (SOL_UDP, UDP_GRO):
                    (segment,) = struct.unpack("i", value[:4])
            assert segment == size
            received += [struct.unpack_from(">I", data, at)[0] for at in range(0, len(data), size)]
        assert received == list(range(count))


def test_full_cone(stage: Stage) -> None:
    """One client socket keeps one mapped port whatever it talks to, and a third party's datagram reaches it there."""
    world = stage.world
    with (
        UdpTarget(world.net, "203.0.113.11") as one,
        UdpTarget(world.net, "203.0.113.12") as two,
        world.net.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
        world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        stranger.bind(("203.0.113.13", 0))
        client.settimeout(3)
        mapped = set()
        for target in (one, two, stage.udp4):
            token = os.urandom(8)
            client.sendto(token, target.address)
            data, sender = client.recvfrom(100)
            assert (data, sender) == (token, target.address)
            mapped.add(target.senders[token])
        # A proxy beside the targets has many addresses and takes the target's own; the port is what counts.
        assert len({port for _, port in mapped}) == 1, f"the client's port was mapped to {mapped}"
        stranger.sendto(b"unasked", mapped.pop())
        assert client.recvfrom(100) == (b"unasked", stranger.getsockname())


def test_many_client_sockets(stage: Stage) -> None:
    """Each client socket has an association of its own; all are answered, each with its own datagram."""
    clients = [stage.world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(100)]
    try:
        for which, client in enumerate(clients):
            client.settimeout(5)
            client.connect(stage.udp4.address)
            client.send(b"%d" % which)
        for which, client in enumerate(clients):
            assert client.recv(100) == b"%d" % which
    finally:
        for client in clients:
            client.close()


def test_first_datagrams_wait_for_the_association(stage: Stage) -> None:
    """What is sent before UDP ASSOCIATE is answered arrives, in order."""
    with stage.world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.connect(stage.udp4.address)
        for which in range(8):
            client.send(b"%d" % which)
        assert [client.recv(10) for _ in range(8)] == [b"%d" % which for which in range(8)]


def test_empty_datagram_does_no_harm(stage: Stage) -> None:
    """Relayed or dropped, the association lives on."""
    with stage.world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.connect(stage.udp4.address)
        client.send(b"before")
        assert client.recv(10) == b"before"
        client.send(b"")
        client.send(b"after")
        assert (client.recv(10) or client.recv(10)) == b"after"


def test_ping_of_our_own_addresses(stage: Stage) -> None:
    for own in OWN:
        done = stage.world.gw.run(["ping", "-c", "3", "-i", "0.01", "-W", "2", own])
        assert done.returncode == 0, done.stdout
        assert " 0% packet loss" in done.stdout
        assert stage.world.gw.run(["ping", "-c", "1", "-s", "1400", "-W", "2", own]).returncode == 0


def test_ping_latency_is_that_of_a_local_answer(stage: Stage) -> None:
    done = stage.world.gw.run(["ping", "-c", "20", "-i", "0.005", "-W", "2", OWN[0]])
    found = re.search(r"= [\d.]+/([\d.]+)/", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < 20, done.stdout


@pytest.mark.parametrize("upstream", ["direct", "socks"])
def test_idle_association_ends(world: World, upstream: str) -> None:
    """After udp-timeout the mapping is given up; the next datagram gets a new one."""
    with UdpTarget(world.net) as target:
        if upstream == "socks":
            peer = RunningPeer(EMBEDDED, world.net)
            world.on_close(peer.close)
            proxy: tuple[str, ...] = ("-p", peer.url)
        else:
            proxy = DIRECT
        with (
            Ringway(world, *proxy, "--udp-timeout", "1s") as ringway,
            world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            client.settimeout(3)
            client.connect(target.address)
            client.send(b"one")
            assert client.recv(10) == b"one"
            assert ringway.flows("udp") == 1
            eventually(lambda: ringway.flows("udp") == 0, "the idle association ended", 6)
            client.send(b"two")
            assert client.recv(10) == b"two"


def test_association_lives_while_it_is_used(world: World) -> None:
    with (
        UdpTarget(world.net) as target,
        Ringway(world, *DIRECT, "--udp-timeout", "1s"),
        world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(3)
        client.connect(target.address)
        give_up_at = time.monotonic() + 2.5
        ports = set()
        which = 0
        while time.monotonic() < give_up_at:
            which += 1
            payload = b"n%d" % which
            client.send(payload)
            assert client.recv(10) == payload
            ports.add(target.senders[payload])
            select.select([client], [], [], 0.2)
        assert len(ports) == 1


def test_more_associations_than_allowed(world: World) -> None:
    """Beyond max-associations the least recently used goes: all are answered, also who lost its mapping."""
    with (
        UdpTarget(world.net) as target,
        Ringway(world, *DIRECT, "--max-associations", "10", "--workers", "1") as ringway,
    ):
        clients = [world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(30)]
        try:
            for which, client in enumerate([*clients, clients[0]]):
                client.settimeout(3)
                client.connect(target.address)
                client.send(b"%d" % which)
                assert client.recv(10) == b"%d" % which
            assert ringway.flows("udp") == 10
            assert ringway.counters()["udp_evicted"] == 21
            clients[29].send(b"again")
            assert clients[29].recv(10) == b"again"
            assert target.senders[b"again"] == target.senders[b"29"]
        finally:
            for client in clients:
                client.close()


def test_a_new_client_waits_for_no_handshake(world: World) -> None:
    """Behind a proxy far away it is answered in less than 1.5 of the round trips that a known one's datagram takes."""

    def answered_in(client: socket.socket, payload: bytes) -> float:
        began_at = time.monotonic()
        client.sendto(payload, target.address)
        assert client.recv(10) == payload
        return time.monotonic() - began_at

    with ExitStack() as stack:
        target = stack.enter_context(UdpTarget(world.net))
        stack.enter_context(Link(world.gw, world.net, {"delay": 0.03}, {"delay": 0.03}))
        peer = stack.enter_context(RunningPeer(EMBEDDED, world.net, LINK_NET4))
        ringway = stack.enter_context(Ringway(world, "-p", peer.url, "--workers", "1"))
        known, new = (stack.enter_context(world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        known.settimeout(5)
        new.settimeout(5)
        cold = answered_in(known, b"cold")
        eventually(lambda: ringway.counters()["udp_opened"] >= 2, "an association stands ready")
        usual = min(answered_in(known, b"%d" % number) for number in range(5))
        assert answered_in(new, b"new") < 1.5 * usual
        assert cold > 3 * usual, "what the pool is for"
        assert ringway.counters()["udp_warm_taken"] == 1


@pytest.mark.parametrize("mapping", ["endpoint-independent", "address-port"])
def test_one_socket_to_200_destinations(world: World, mapping: str) -> None:
    """By default one mapped port, on one of four workers; with address-port a port each, and most workers busy."""
    targets = [UdpTarget(world.net, TARGET4) for _ in range(200)]
    try:
        with (
            Ringway(world, *DIRECT, "--workers", "4", "--udp-mapping", mapping) as ringway,
            world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            client.settimeout(3)
            ports = set()
            for which, target in enumerate(targets):
                token = b"%d" % which
                client.sendto(token, target.address)
                assert client.recvfrom(100) == (token, target.address)
                ports.add(target.senders[token][1])
            blocks = ringway.status()["counters"].values()
            busy = [block for block in blocks if block.get("udp_datagrams_up")]
            if mapping == "address-port":
                assert len(ports) > 190  # the kernel may give one port twice, to two destinations
                assert len(busy) >= 3
            else:
                assert len(ports) == 1
                assert len(busy) == 1
    finally:
        for target in targets:
            target.close()


def test_block_quic(world: World) -> None:
    """Who tries QUIC hears at once that there is none."""
    with (
        Ringway(world, *DIRECT, "--block-quic"),
        world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(3)
        client.connect((TARGET4, 443))
        client.send(b"initial")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)


def test_datagrams_to_nowhere_do_no_harm(stage: Stage) -> None:
    """No route behind the gateway: an error or silence, and the same client socket still reaches others."""
    with stage.world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        for _ in range(20):
            client.sendto(b"lost", (NO_ROUTE4, 99))
        client.sendto(b"found", stage.udp4.address)
        assert client.recv(10) == b"found"
