"""open_device: what it takes, what it refuses in one line, and that a made device goes with its last descriptor."""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct

import pytest

from gateway import device as device_module
from gateway.addresses import configure
from gateway.device import DeviceError, TunDevice, feature_names, open_device, was_made
from gateway.offload import SoftwareOffload
from tests.netns.world import Namespace, why_not
from workers.wire.checksum import checksum, pseudo_sum

NAME = "tun7"
TUNSETIFF, TUNSETPERSIST, TUNSETVNETHDRSZ, TUNGETVNETHDRSZ = 0x400454CA, 0x400454CB, 0x400454D8, 0x800454D7


needs_tun = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def namespace():
    """A network namespace for the devices of one test, so that the machine's own is left alone."""
    with contextlib.closing(Namespace("device")) as made, made.inside():
        yield made


@pytest.fixture
def raw_tun(namespace):
    """Make a TUN as somebody else would, with any flags; all are closed at the end."""
    opened = []

    def make(flags: int) -> int:
        opened.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        if flags:
            fcntl.ioctl(opened[-1], TUNSETIFF, struct.pack("16sH22x", NAME.encode(), flags))
        return os.dup(opened[-1])

    yield make
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("tap://x", "neither tun://NAME nor fd://N"),
        ("tun0", "neither tun://NAME nor fd://N"),
        ("tun://", "not valid"),
        ("tun://a/b", "not valid"),
        ("tun://tun%d", "not valid"),
        ("tun://a b", "not valid"),
        ("tun://..", "not valid"),
        ("tun://" + "x" * 16, "has 16 octets, 15 are allowed"),
        ("tun://" + "ü" * 8, "has 16 octets, 15 are allowed"),
        ("fd://", "names no descriptor"),
        ("fd://three", "names no descriptor"),
        ("fd://-1", "is not open"),
        ("fd://9999", "is not open"),
        ("fd://99999999999999999999", "names no descriptor"),
    ],
)
def test_wrong_urls_are_named(url, says):
    with pytest.raises(DeviceError, match=says) as caught:
        open_device(url, mtu=1500)
    assert "\n" not in str(caught.value)


def test_descriptors_that_are_no_device_are_named():
    reader, writer = os.pipe()
    with socket.socket() as tcp, pytest.raises(DeviceError, match="not of AF_UNIX"):
        open_device(f"fd://{tcp.fileno()}", mtu=1500)
    with pytest.raises(DeviceError, match="neither an attached TUN device nor a datagram socket"):
        open_device(f"fd://{reader}", mtu=1500)
    left, right = socket.socketpair()
    with left, right, pytest.raises(DeviceError, match="SOCK_SEQPACKET"):
        open_device(f"fd://{left.fileno()}", mtu=1500)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "chmod 0666"),
        (errno.EPERM, "no permission to open"),
        (errno.ENOENT, "modprobe tun"),
        (errno.ENXIO, "modprobe tun"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_a_clone_device_that_cannot_be_opened_is_explained(monkeypatch, number, says):
    def refuse(path, flags):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(device_module.os, "open", refuse)
    with pytest.raises(DeviceError, match=says):
        open_device("tun://tun7", mtu=1500)


@pytest.mark.parametrize(
    ("number", "existed", "says"),
    [(errno.EPERM, False, "CAP_NET_ADMIN"), (errno.EBUSY, True, "in use"), (errno.EINVAL, True, "is no TUN device")],
)
def test_a_device_that_cannot_be_had_is_explained(monkeypatch, number, existed, says):
    def refuse(fd, request, argument):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(device_module, "_open_clone", lambda: os.open("/dev/null", os.O_RDWR))
    monkeypatch.setattr(device_module, "_exists", lambda name: existed)
    monkeypatch.setattr(device_module.fcntl, "ioctl", refuse)
    with pytest.raises(DeviceError, match=says):
        open_device("tun://tun7", mtu=1500)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_is_a_device(kind):
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs:
        device = open_device(f"fd://{ours.fileno()}", mtu=1400)
        ours.detach()
        assert isinstance(device, SoftwareOffload)
        assert (device.mtu, device.features, was_made(device)) == (1400, 0, False)
        with pytest.raises(BlockingIOError):
            device.readv([memoryview(bytearray(100))])
        device.write(memoryview(bytes(10) + b"packet"))
        assert theirs.recv(100) == b"packet"
        device.close()


def test_a_full_socket_loses_the_packet_but_holds_nobody_up():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        device = open_device(f"fd://{ours.detach()}", mtu=1500)
        with pytest.raises(BlockingIOError):
            for _ in range(10_000):
                device.write(memoryview(bytes(1510)))
        device.close()


@needs_tun
def test_a_made_tun_has_everything_and_goes_with_its_descriptor(namespace):
    device = open_device(f"tun://{NAME}", mtu=1500)
    assert isinstance(device, TunDevice), "nothing stands before a device that lacks nothing"
    assert was_made(device)
    assert feature_names(device.features)[:4] == ["csum", "tso4", "tso6", "ecn"]
    assert not os.get_blocking(device.fileno())
    with pytest.raises(DeviceError, match="in use by another program"):
        open_device(f"tun://{NAME}", mtu=1500)
    duplicate = os.dup(device.fileno())
    device.close()
    assert NAME in {name for _, name in socket.if_nameindex()}
    os.close(duplicate)
    assert NAME not in {name for _, name in socket.if_nameindex()}


@needs_tun
@pytest.mark.parametrize("offloads", [True, False])
def test_packets_pass_with_and_without_offloads(namespace, offloads):
    device = open_device(f"tun://{NAME}", mtu=1400, offloads=offloads)
    assert bool(device.features) == offloads
    configure(NAME, mtu=1400, address="198.51.100.1", mask="255.255.255.0", address6="fd72:6e67:7761:7901::1/64")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("198.51.100.1", 0))
        port = sender.getsockname()[1]
        sender.settimeout(5)
        sender.sendto(b"question", ("198.51.100.2", 5353))
        frame = _read_udp(device, 5353)
        assert frame[10 + 28 :] == b"question"
        answer = bytearray(frame[10 : 10 + 28]) + b"answer"
        answer[12:20] = answer[16:20] + answer[12:16]
        struct.pack_into("!HHHH", answer, 20, 5353, port, 8 + 6, 0)
        struct.pack_into("!H", answer, 2, len(answer))
        struct.pack_into("!H", answer, 10, 0)
        struct.pack_into("!H", answer, 10, checksum(bytes(answer[:20])))
        half = pseudo_sum(bytes(answer[12:16]), bytes(answer[16:20]), 17, 14)
        struct.pack_into("!H", answer, 26, half)
        header = struct.pack("<BBHHHH", 1, 0, 0, 0, 20, 6)
        device.writev([memoryview(header + answer[:28]), memoryview(bytes(answer[28:]))])
        assert sender.recv(100) == b"answer"
    device.close()


def _read_udp(device, port: int) -> bytes:
    """Read frames until an IPv4 datagram to that port comes; the kernel has things of its own to say."""
    poll = select.poll()
    poll.register(device.fileno(), select.POLLIN)
    buffer = memoryview(bytearray(70000))
    for _ in range(50):
        assert poll.poll(5000), "no frame came"
        length = device.readv([buffer])
        packet = bytes(buffer[10:length])
        if packet[0] >> 4 == 4 and packet[9] == 17 and struct.unpack_from("!H", packet, 22)[0] == port:
            return bytes(buffer[:length])
    raise AssertionError("50 frames, none of them the datagram")


@needs_tun
def test_a_persistent_device_is_used_as_it_is(namespace):
    made = open_device(f"tun://{NAME}", mtu=1500)
    configure(NAME, mtu=1300, address="198.51.100.1", mask="255.255.255.0")
    fcntl.ioctl(made.fileno(), TUNSETPERSIST, 1)
    made.close()
    try:
        device = open_device(f"tun://{NAME}", mtu=1500)
        assert (device.mtu, was_made(device)) == (1300, False)
        device.close()
        assert NAME in {name for _, name in socket.if_nameindex()}
    finally:
        last = open_device(f"tun://{NAME}", mtu=1500)
        fcntl.ioctl(last.fileno(), TUNSETPERSIST, 0)
        last.close()
    assert NAME not in {name for _, name in socket.if_nameindex()}


@needs_tun
@pytest.mark.parametrize(
    ("flags", "says"), [(0x0001, "packet information"), (0x0002 | 0x1000, "TAP"), (0x0001 | 0x4000, "IFF_NO_PI")]
)
def test_an_inherited_device_of_the_wrong_kind_is_explained(raw_tun, flags, says):
    fd = raw_tun(flags)
    with pytest.raises(DeviceError, match=says):
        open_device(f"fd://{fd}", mtu=1500)
    os.close(fd)


@needs_tun
def test_an_inherited_device_brings_what_it_has(raw_tun):
    fd = raw_tun(0x0001 | 0x1000)
    configure(NAME, mtu=1500, address="198.51.100.1", mask="255.255.255.0")
    device = open_device(f"fd://{fd}", mtu=1500)
    assert isinstance(device, SoftwareOffload)
    assert (device.name, device.features, was_made(device)) == (NAME, 0, False)
    device.close()


@needs_tun
def test_a_longer_vnet_header_is_shortened(raw_tun):
    fd = raw_tun(0x0001 | 0x1000 | 0x4000)
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 12))  # as QEMU has it
    device = open_device(f"fd://{fd}", mtu=1500)
    assert isinstance(device, TunDevice)
    size = bytearray(4)
    fcntl.ioctl(fd, TUNGETVNETHDRSZ, size)
    assert struct.unpack("i", size) == (10,)
    device.close()


@needs_tun
def test_an_attached_descriptor_is_wanted(raw_tun):
    fd = raw_tun(0)
    with pytest.raises(DeviceError, match="neither an attached TUN"):
        open_device(f"fd://{fd}", mtu=1500)
    os.close(fd)


@needs_tun
def test_addresses_that_another_device_has_are_named(namespace):
    device = open_device(f"tun://{NAME}", mtu=1500)
    configure(NAME, mtu=1500, address="198.51.100.1", mask="255.255.255.0")
    with pytest.raises(DeviceError, match="address"):
        configure(NAME, mtu=1500, address="198.51.100.1", mask="255.255.255.0")
    device.close()


@needs_tun
def test_below_1280_octets_there_is_no_ipv6(namespace):
    device = open_device(f"tun://{NAME}", mtu=1000)
    ipv6 = configure(NAME, mtu=1000, address="198.51.100.1", mask="255.255.255.0", address6="fd72:6e67:7761:7901::1/64")
    assert not ipv6
    device.close()
