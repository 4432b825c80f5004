"""A gateway without a TUN device: IP packets go in and come out of a socket pair.

    python examples/library.py [PROXY]

PROXY is a URL as of `ringway run -p`, direct:// if it is left out. No rights are needed: the kernel's network is not
touched. Instead of a socket, `device` may be any object with read() -> bytes and write(bytes), "tun://NAME", or a
descriptor; the other keywords are the configuration keys (mtu=…, workers=…, public_only=…).
"""

import socket
import sys

import dpkt

from gateway.api import Gateway

CLIENT, GATEWAY = "198.18.0.1", "198.18.0.2"  # the second is what Ringway itself answers from


def ping(sequence: int) -> bytes:
    """Build an ICMP echo request."""
    echo = dpkt.icmp.ICMP.Echo(id=4711, seq=sequence, data=b"is anybody there?")
    icmp = dpkt.icmp.ICMP(type=dpkt.icmp.ICMP_ECHO, data=echo)
    packet = dpkt.ip.IP(src=socket.inet_aton(CLIENT), dst=socket.inet_aton(GATEWAY), p=dpkt.ip.IP_PROTO_ICMP, data=icmp)
    return bytes(packet)


def main() -> None:
    """Ping the gateway and print what comes back."""
    proxy = sys.argv[1] if len(sys.argv) > 1 else "direct://"
    packets, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packets.settimeout(10)
    with packets, device, Gateway(device=device, proxy=proxy, workers=1) as gateway:
        print("ready:", gateway.status()["device"])
        for sequence in range(3):
            packets.send(ping(sequence))
            answer = dpkt.ip.IP(packets.recv(65535))
            print(
                f"{socket.inet_ntoa(answer.src)} answers ping {answer.icmp.data.seq}: {answer.icmp.data.data.decode()}"
            )


if __name__ == "__main__":
    main()
