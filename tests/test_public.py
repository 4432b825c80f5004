"""public-only's table: every entry of the registries, at both edges, and the forms that carry an IPv4 address."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.public import is_public

SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.2.0/24 192.88.99.0/24
192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24
"""
PUBLIC = """
1.1.1.1 8.8.8.8 192.0.0.9 192.0.0.10 192.31.196.1 192.52.193.1 192.175.48.1 223.255.255.255 2606:4700::1111
2001:1::1 2001:1::2 2001:1::3 2001:3::1 2001:4:112::1 2001:20::1 2001:30::1 2001:200::1 2620:4f:8000::1
2a00::1 3ffe::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1
"""
NOT_PUBLIC = """
192.0.0.8 192.0.0.11 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::8.8.8.8 ::ffff:10.0.0.1
::ffff:127.0.0.1 64:ff9b::192.168.1.1 64:ff9b:1::808:808 100::1 100:0:0:1::1 2001::1 2001:1::4 2001:2::1
2001:10::1 2001:db8::1 2002:a00:1::1 2002:7f00:1::1 3fff::1 3fff:fff::1 5f00::1 fc00::1 fd72:6e67:7761:7900::2
fe80::1 fec0::1 ff02::1 ff0e::1 4000::1
"""


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


@pytest.mark.parametrize("network", SPECIAL.split())
def test_a_special_network_and_its_neighbours(network):
    block = ipaddress.ip_network(network)
    first, last = int(block[0]), int(block[-1])
    assert not is_public(first.to_bytes(4))
    assert not is_public(last.to_bytes(4))
    assert is_public((last + 1).to_bytes(4))
    if first:
        assert is_public((first - 1).to_bytes(4))


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public(address):
    assert is_public(packed(address))


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_not_public(address):
    assert not is_public(packed(address))


def test_another_length_is_an_error():
    with pytest.raises(ValueError, match="5 octets"):
        is_public(bytes(5))


@given(st.integers(0, 2**32 - 1))
def test_agrees_with_the_standard_library_where_that_is_right(number):
    address = ipaddress.IPv4Address(number)
    ours = is_public(address.packed)
    if address.is_private or address.is_multicast or address.is_reserved:
        # 3.11 calls all of 192.0.0.0/24 private
        assert not ours or address in ipaddress.ip_network("192.0.0.0/24")


@given(st.integers(0, 2**32 - 1))
def test_an_address_that_carries_another_is_as_public_as_that(number):
    inner = number.to_bytes(4)
    for prefix, behind in ((bytes(10) + b"\xff\xff", 0), (b"\0\x64\xff\x9b" + bytes(8), 0), (b"\x20\x02", 10)):
        assert is_public(prefix + inner + bytes(behind)) == is_public(inner)
