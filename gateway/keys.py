"""The configuration keys one by one: how each is written, what it may hold, and the sentence that helps with it.

A key is the same thing in four places: `udp-timeout` in the file, `RINGWAY_UDP_TIMEOUT` in the environment,
`--udp-timeout` on the command line, `Config.udp_timeout` in the program. This table is where they meet; the defaults
stand in `gateway.config.Config`.
"""

from typing import Final, NamedTuple

from gateway.keyvalues import (
    BOOLEAN_ALLOWED,
    DURATION_ALLOWED,
    MAX_SOCKET_PATH,
    Reader,
    names,
    read_address4,
    read_address6,
    read_addresses,
    read_boolean,
    read_device,
    read_interface,
    read_interface6,
    read_mask,
    read_proxy,
    read_size,
    read_socket_path,
    read_text,
    read_udp_address,
    read_user,
    seconds,
    seconds_or_never,
    whole,
)


class Key(NamedTuple):
    """One configuration key."""

    name: str  #: as the TOML file has it
    help: str  #: for --help
    allowed: str  #: ends the sentence "allowed is …"
    read: Reader  #: raw value, is it text? → the value for Config
    metavar: str  #: for --help
    flags: tuple[str, ...] = ()  #: further flags that mean the same key
    boolean: bool = False  #: the flag alone means true
    secret: bool = False  #: the value is never repeated in a message

    @property
    def field(self) -> str:
        """The attribute of Config."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "RINGWAY_" + self.field.upper()

    @property
    def flag(self) -> str:
        """The flag that is named first."""
        return "--" + self.name


def _duration(name: str, help_: str) -> Key:
    return Key(name, help_, DURATION_ALLOWED, seconds, "TIME")


KEYS: Final[tuple[Key, ...]] = (
    Key(
        "proxy",
        "Where traffic leaves: socks5://user:pass@host:port (percent-encoded), socks4://user@…, socks4a://…, http://… "
        "and https://… (CONNECT), SOCKS5 inside TLS, WebSocket or HTTP (socks5+tls://…, socks5+ws://…/path, "
        "socks5+wss://…, socks5+http://…), direct:// (no proxy) or reject:// (nowhere).",
        "socks5://[USER[:PASSWORD]@]HOST[:PORT], socks5h://…, socks4://[USER@]…, socks4a://…, http://…, https://…, "
        "socks5+tls://…, socks5+ws://…, socks5+wss://…, socks5+http://…, direct:// or reject://",
        read_proxy,
        "URL",
        ("-p", "--local-socks-addr"),
        secret=True,
    ),
    Key(
        "password-file",
        "File whose first line is the proxy's password; RINGWAY_PASSWORD and the systemd credential "
        "ringway-password hold one too.",
        "the path of a file",
        read_text,
        "FILE",
    ),
    Key("tls-ca", "Trust this CA (PEM) and no other, for a proxy in TLS.", "the path of a file", read_text, "FILE"),
    Key(
        "tls-server-name",
        "Name that the proxy's certificate must have, and SNI, if it is not the URL's host.",
        "a host name",
        read_text,
        "NAME",
    ),
    Key("tls-cert", "Certificate (PEM) to show to the proxy.", "the path of a file", read_text, "FILE"),
    Key("tls-key", "Its key, if that is not in the same file.", "the path of a file", read_text, "FILE"),
    Key(
        "device",
        "Device to read packets from: tun://NAME (made, and removed at the end) or fd://N (inherited).",
        "tun://NAME with a name of 1 to 15 bytes, or fd://N",
        read_device,
        "URL",
        ("-d", "--tun-device"),
    ),
    Key("mtu", "MTU of the device; below 1280 it carries IPv4 only.", *whole(576, 65535), "BYTES"),
    Key("tun-address", "The kernel's IPv4 address on the device.", "an IPv4 address", read_address4, "ADDRESS"),
    Key(
        "tun-mask",
        "Netmask of tun-address.",
        "a netmask from 128.0.0.0 to 255.255.255.252 or its length in bits",
        read_mask,
        "MASK",
    ),
    Key(
        "tun-gw",
        "IPv4 address that Ringway itself answers from; without one given, the address next to tun-address.",
        "an IPv4 address",
        read_address4,
        "ADDRESS",
    ),
    Key(
        "tun-address6",
        "The kernel's IPv6 address on the device, with its prefix length; none for no IPv6.",
        "an IPv6 address with prefix length, or none",
        read_interface6,
        "ADDRESS/N",
    ),
    Key(
        "tun-gw6",
        "IPv6 address that Ringway itself answers from; without one given, the address next to tun-address6.",
        "an IPv6 address",
        read_address6,
        "ADDRESS",
    ),
    Key(
        "tun-dns",
        "Resolvers that the device brings, separated by commas.",
        "IP addresses, separated by commas (in the file, a list)",
        read_addresses,
        "ADDRESSES",
    ),
    Key("workers", "Worker processes; 0 is one for each CPU that may be used.", *whole(0, 256), "N"),
    Key(
        "placement",
        "pipeline: reader, workers and writer are processes; single: all of them in one, for one or two cores.",
        *names("pipeline", "single"),
        "NAME",
    ),
    Key("fwmark", "Mark of the sockets towards the proxy; 0 is none.", *whole(0, 0xFFFF_FFFF), "MARK"),
    Key(
        "interface",
        "Network interface that the sockets towards the proxy are bound to.",
        "the name of an interface",
        read_interface,
        "NAME",
    ),
    _duration("connect-timeout", "How long a connection to the proxy, with its handshake, may take."),
    _duration("udp-timeout", "How long a UDP association lives without datagrams."),
    _duration("dns-timeout", "How long a DNS query waits for its answer."),
    _duration("tcp-timeout", "How long a TCP connection lives without traffic (RFC 5382)."),
    _duration("tcp-half-closed-timeout", "How long a half-closed TCP connection lives without traffic."),
    Key(
        "tcp-keepalive",
        "How long a TCP client may be silent before it is asked whether it is still there; 0 is never.",
        DURATION_ALLOWED.replace("above 0", "of 0 or more"),
        seconds_or_never,
        "TIME",
    ),
    _duration("tcp-keepalive-interval", "How long to wait for an answer before it is asked again."),
    Key("tcp-keepalive-count", "How often it is asked before it is given up.", *whole(1, 100), "N"),
    Key(
        "tcp-receive-buffer",
        "Bytes of one TCP connection that may wait for the proxy; its window starts small and grows up to that.",
        'a size from 64k to 1g, in bytes (4194304) or as "512k", "4m"',
        read_size(64 << 10, 1 << 30),
        "BYTES",
        ("--tcp-rcvbuf",),
    ),
    Key("max-flows", "Flows in one worker; more are refused.", *whole(1, 1 << 20), "N"),
    Key("max-pending", "Connections to the proxy being made at once in one worker.", *whole(1, 1 << 16), "N"),
    Key("max-associations", "UDP associations in one worker.", *whole(1, 1 << 16), "N"),
    Key(
        "udp-mapping",
        "What shares a public port: endpoint-independent: all that a client socket sends, as games and calls need; "
        "address-port: what it sends to one destination, spread over all workers (RFC 4787).",
        *names("endpoint-independent", "address-port"),
        "KIND",
    ),
    Key(
        "udp-filtering",
        "Who may answer a client socket: endpoint-independent: anybody; address: hosts that it sent to; address-port: "
        "ports that it sent to (with udp-mapping address-port always).",
        *names("endpoint-independent", "address", "address-port"),
        "KIND",
    ),
    Key(
        "udp-warm",
        "UDP associations that stand ready in each worker, so that a new client does not wait for the proxy; each "
        "costs it an idle connection, and one handshake per udp-timeout.",
        *whole(0, 64),
        "N",
    ),
    Key(
        "block-quic",
        "Answer UDP to port 443 with port unreachable, so that browsers use TCP.",
        BOOLEAN_ALLOWED,
        read_boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "udp-mode",
        "How datagrams reach the proxy: udp (UDP ASSOCIATE), inside TCP as gost, hev or uot (sing-box) do it, or auto: "
        "the first of these that it has, else DNS over TCP and port unreachable.",
        *names("auto", "udp", "gost", "hev", "uot"),
        "MODE",
    ),
    Key(
        "pipelined-handshake",
        "Send a SOCKS5 proxy method, password and request in one go, which saves a round trip or two: yes, no, or "
        "auto: if it was seen to take that.",
        *names("auto", "yes", "no"),
        "WHEN",
    ),
    Key(
        "warm-connections",
        "Connections to the proxy that each worker keeps ready, so that a new flow waits for its request alone.",
        *whole(0, 1024),
        "N",
    ),
    Key(
        "tcp-fast-open",
        "Let the first octets to the proxy ride in the SYN (RFC 7413); of use with a pipelined handshake.",
        BOOLEAN_ALLOWED,
        read_boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "udp-address",
        "Where datagrams go after UDP ASSOCIATE: auto, peer (the proxy), as-told (by it), or an address.",
        "auto, peer, as-told or an IP address",
        read_udp_address,
        "WHERE",
    ),
    Key(
        "early-accept",
        "Answer a client's SYN before the proxy has connected; then every port looks open, and a refusal is a reset.",
        BOOLEAN_ALLOWED,
        read_boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "congestion",
        "Congestion control towards clients: cubic (RFC 9438) or newreno (RFC 5681).",
        *names("cubic", "newreno"),
        "NAME",
    ),
    Key(
        "public-only",
        "Refuse destinations that are not on the public Internet.",
        BOOLEAN_ALLOWED,
        read_boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "enable-dns-cache",
        "Answer names that were asked for before from memory, one cache for all workers.",
        BOOLEAN_ALLOWED,
        read_boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "dns-cache-size",
        "Bytes that the cache of names may take, a power of two below is used; a name takes about 160.",
        'a size from 256k to 1g, in bytes (16777216) or as "512k", "4m"',
        read_size(256 << 10, 1 << 30),
        "BYTES",
    ),
    Key(
        "offloads",
        "Let the kernel hand over and take super-segments and unfinished checksums (=false: packet by packet).",
        BOOLEAN_ALLOWED,
        read_boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "loglevel",
        "What is logged to standard error.",
        *names("debug", "info", "warn", "error", "silent"),
        "LEVEL",
    ),
    Key(
        "control",
        "Control socket; by default DEVICE.sock in /run/ringway as root, else in a private directory.",
        f"the path of a socket, at most {MAX_SOCKET_PATH} bytes",
        read_socket_path,
        "PATH",
    ),
    Key(
        "user",
        "User that the processes around the workers become when started as root.",
        "a user name",
        read_user,
        "NAME",
    ),
    Key("busy-poll", "Microseconds that a process looks again before it sleeps.", *whole(0, 1_000_000), "US"),
)

BY_NAME: Final = {key.name: key for key in KEYS}
