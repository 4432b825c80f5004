"""The configuration: layers, values, and the sentences that name what is wrong."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Config, ConfigError, ProxyUrl, control_directories, control_path, load, parse_proxy
from gateway.keys import KEYS
from gateway.keyvalues import seconds


def refused(flags: dict[str, object] | None = None, env: dict[str, str] | None = None, path: Path | None = None) -> str:
    """Return the sentence that a configuration is refused with; it is always one line."""
    with pytest.raises(ConfigError) as caught:
        load(path, env or {}, flags or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(directory: Path, text: str) -> Path:
    file = directory / "ringway.toml"
    file.write_text(text)
    return file


def test_every_key_is_a_field_and_every_field_a_key() -> None:
    assert [key.field for key in KEYS] == [field.name for field in msgspec.structs.fields(Config)]
    assert [key.name for key in KEYS] == [field.encode_name for field in msgspec.structs.fields(Config)]


def test_defaults_pass_their_own_keys() -> None:
    defaults = msgspec.to_builtins(Config())
    for key in KEYS:
        if key.name not in ("password-file",):
            assert key.read(defaults[key.name], False) == defaults[key.name]
    assert load(None, {}, {}) == Config()


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = written(tmp_path, 'mtu = 1400\nfwmark = 1\nloglevel = "warn"\n')
    config = load(path, {"RINGWAY_MTU": "1300", "RINGWAY_FWMARK": "2"}, {"mtu": "1280"})
    assert (config.mtu, config.fwmark, config.loglevel, config.workers) == (1280, 2, "warn", 0)


def test_every_key_can_stand_in_the_file_and_in_the_environment(tmp_path: Path) -> None:
    values = {
        "proxy": "direct://",
        "password-file": "",
        "tls-ca": "",
        "tls-server-name": "",
        "tls-cert": "",
        "tls-key": "",
        "device": "fd://3",
        "mtu": 9000,
        "tun-address": "10.0.0.2",
        "tun-mask": "255.255.255.0",
        "tun-gw": "10.0.0.1",
        "tun-address6": "fd00::2/64",
        "tun-gw6": "fd00::1",
        "tun-dns": ["1.1.1.1", "2606:4700:4700::1111"],
        "workers": 1,
        "placement": "single",
        "fwmark": 438,
        "interface": "eth0",
        "connect-timeout": 1.5,
        "udp-timeout": 60.0,
        "dns-timeout": 5.0,
        "tcp-timeout": 300.0,
        "tcp-half-closed-timeout": 60.0,
        "tcp-keepalive": 0.0,
        "tcp-keepalive-interval": 30.0,
        "tcp-keepalive-count": 5,
        "tcp-receive-buffer": 1 << 20,
        "max-flows": 10,
        "max-pending": 11,
        "max-associations": 12,
        "udp-mapping": "address-port",
        "udp-filtering": "address-port",
        "udp-warm": 3,
        "block-quic": True,
        "udp-mode": "udp",
        "pipelined-handshake": "no",
        "warm-connections": 4,
        "tcp-fast-open": True,
        "udp-address": "as-told",
        "early-accept": True,
        "congestion": "newreno",
        "public-only": True,
        "enable-dns-cache": True,
        "dns-cache-size": 1 << 20,
        "offloads": False,
        "loglevel": "silent",
        "control": "/tmp/ringway.sock",
        "user": "daemon",
        "busy-poll": 50,
    }
    lines, env = [], {}
    for key in KEYS:
        value = values[key.name]
        text = ("true" if value else "false") if isinstance(value, bool) else value
        lines.append(f'{key.name} = "{text}"' if isinstance(text, str) and text is value else f"{key.name} = {text}")
        env[key.variable] = ",".join(value) if isinstance(value, list) else str(text)
    from_file = load(written(tmp_path, "\n".join(lines)), {}, {})
    assert from_file == load(None, env, {}) == msgspec.convert(values | {"password-file": ""}, Config)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("mtu = 99", "mtu = 99: allowed is a whole number from 576 to 65535"),
        ('mtu = "1500"', "mtu = '1500': allowed is a whole number from 576 to 65535"),
        ("mtu = true", "mtu = true: allowed is a whole number from 576 to 65535"),
        ("mtu = 1500.0", "mtu = 1500.0: allowed is a whole number from 576 to 65535"),
        ('public-only = "yes"', "public-only = 'yes': allowed is true or false"),
        ('placement = "both"', "placement = 'both': allowed is pipeline or single"),
        ('udp_timeout = "2m"', "unknown key 'udp_timeout'; the nearest known one is udp-timeout"),
        ("proxi = 1", "unknown key 'proxi'; the nearest known one is proxy"),
        ("[tun]\nmtu = 1", "unknown key 'tun'; the nearest known one is"),
        ("mtu 1500", "not TOML: Expected '=' after a key"),
        ("tun-dns = [1]", "tun-dns = [1]: allowed is IP addresses"),
        ('udp-timeout = "soon"', "udp-timeout = 'soon': allowed is a time above 0"),
        ("tcp-keepalive = -1", "tcp-keepalive = -1: allowed is a time of 0 or more and up to 30 days"),
        ("tcp-keepalive-interval = 0", "tcp-keepalive-interval = 0: allowed is a time above 0"),
        ("tcp-keepalive-count = 0", "tcp-keepalive-count = 0: allowed is a whole number from 1 to 100"),
        ("tcp-receive-buffer = 65535", "tcp-receive-buffer = 65535: allowed is a size from 64k to 1g"),
        ('tcp-receive-buffer = "2g"', "tcp-receive-buffer = '2g': allowed is a size from 64k to 1g"),
        ('tcp-receive-buffer = "4 MB"', "tcp-receive-buffer = '4 MB': allowed is a size from 64k to 1g"),
        ("udp-timeout = inf", "udp-timeout = inf: allowed is a time above 0"),
        ('proxy = "trojan://u:secret@h"', "proxy: trojan:// is not supported yet: allowed are socks5://"),
    ],
)
def test_errors_in_a_file_name_file_key_and_what_is_allowed(tmp_path: Path, line: str, sentence: str) -> None:
    path = written(tmp_path, line)
    said = refused(path=path)
    assert said.startswith(f"{path}: {sentence}")
    assert "secret" not in said


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert refused(path=tmp_path / "none.toml").endswith("cannot read the configuration: No such file or directory")
    assert "Is a directory" in refused(path=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'user = "\xe9"')
    assert "not UTF-8 at byte 8" in refused(path=tmp_path / "latin.toml")


def test_keepalive_may_be_off(tmp_path: Path) -> None:
    assert load(None, {"RINGWAY_TCP_KEEPALIVE": "0"}, {}).tcp_keepalive == 0
    assert load(written(tmp_path, "tcp-keepalive = 0"), {}, {}).tcp_keepalive == 0
    assert load(None, {}, {"tcp-keepalive": "1h"}).tcp_keepalive == 3600


@pytest.mark.parametrize(
    ("text", "octets"), [("65536", 65536), ("512k", 512 << 10), ("4M", 4 << 20), ("4MiB", 4 << 20), ("1gb", 1 << 30)]
)
def test_sizes(tmp_path: Path, text: str, octets: int) -> None:
    assert load(None, {}, {"tcp-receive-buffer": text}).tcp_receive_buffer == octets
    assert load(written(tmp_path, f'tcp-receive-buffer = "{text}"'), {}, {}).tcp_receive_buffer == octets


def test_errors_name_the_flag_or_the_variable() -> None:
    assert refused({"mtu": "99"}) == "--mtu 99: allowed is a whole number from 576 to 65535"
    assert refused(env={"RINGWAY_MTU": "99"}) == "RINGWAY_MTU=99: allowed is a whole number from 576 to 65535"
    assert refused(env={"RINGWAY_PROXY": "foo://u:secret@h"}).startswith("RINGWAY_PROXY: unknown scheme foo://")
    assert refused({"mtuu": "1500"}).endswith("the nearest known one is mtu")


def test_an_empty_variable_is_not_set() -> None:
    assert load(None, {"RINGWAY_MTU": "", "RINGWAY_PROXY": ""}, {}) == Config()


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90.0), ("0.5", 0.5), ("90s", 90.0), ("2m", 120.0), ("1h30m", 5400.0), ("500ms", 0.5), ("1.5m", 90.0)],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "s", "1d", "1 2", "1h 30m", "nan", "inf", "1e3", "9999h", "0s", "٣"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        seconds(text)


def test_devices() -> None:
    for text, device in (("tun0", "tun://tun0"), ("tun://a", "tun://a"), ("fd://03", "fd://3")):
        assert load(None, {}, {"device": text}).device == device
    for text in (
        "",
        "tap://t",
        "tun://",
        "tun://sixteen-bytes-xx",
        "tun://a/b",
        "tun://a b",
        "fd://x",
        "fd://-1",
        "tun://..",
    ):
        assert "allowed is tun://NAME" in refused({"device": text})


# -- addresses of the device --


def test_own_address_is_chosen_where_only_the_network_is_given() -> None:
    config = load(None, {}, {"tun-address": "10.0.0.2", "tun-mask": "255.255.255.0"})
    assert config.tun_gw == "10.0.0.3"
    assert load(None, {}, {"tun-address": "10.0.0.2", "tun-mask": "30"}).tun_gw == "10.0.0.1"
    assert load(None, {}, {"tun-address6": "fd00::9/64"}).tun_gw6 == "fd00::a"
    assert load(None, {}, {"tun-address6": "none"}).tun_address6 == ""


def test_the_flags_of_gotun2socks_together() -> None:
    flags = {"tun-address": "10.0.0.2", "tun-mask": "255.255.255.0", "tun-gw": "10.0.0.1", "tun-dns": "8.8.8.8,8.8.4.4"}
    config = load(None, {}, flags)
    assert (config.tun_address, config.tun_gw, config.tun_dns) == ("10.0.0.2", "10.0.0.1", ["8.8.8.8", "8.8.4.4"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"tun-gw": "1.1.1.1"}, "tun-gw 1.1.1.1: allowed is an address in 198.18.0.0/15"),
        ({"tun-gw": "198.18.0.1"}, "tun-gw 198.18.0.1: allowed is an address in 198.18.0.0/15 other than"),
        ({"tun-gw6": "fd00::1"}, "tun-gw6 fd00::1: allowed is an address in fd72:6e67:7761:7900::/64"),
        ({"tun-address": "10.0.0.0", "tun-mask": "24"}, "tun-address 10.0.0.0: allowed is a host's address"),
        ({"tun-address": "224.0.0.1"}, "tun-address 224.0.0.1: allowed is an address that a device can have"),
        ({"tun-mask": "255.0.255.0"}, "--tun-mask 255.0.255.0: allowed is a netmask"),
        ({"tun-mask": "0.0.0.255"}, "--tun-mask 0.0.0.255: allowed is a netmask"),
        ({"tun-address6": "fd00::1/128"}, "fd00::1/128 has no room"),
    ],
)
def test_addresses_that_do_not_fit(flags: dict[str, object], sentence: str) -> None:
    assert refused(flags).startswith(sentence)


def test_single_placement_has_one_worker() -> None:
    assert "has one worker, not 2" in refused({"placement": "single", "workers": "2"})


def test_filtering_is_never_wider_than_the_mapping() -> None:
    assert load(env={}, flags={"udp-mapping": "address-port"}).udp_filtering == "address-port"
    for wider in ("endpoint-independent", "address"):
        assert "wider than udp-mapping" in refused({"udp-mapping": "address-port", "udp-filtering": wider})
        assert load(env={}, flags={"udp-filtering": wider}).udp_filtering == wider


# -- proxy URLs --


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("127.0.0.1", ProxyUrl("socks5", "127.0.0.1", 1080)),
        ("127.0.0.1:1081", ProxyUrl("socks5", "127.0.0.1", 1081)),
        (":1080", ProxyUrl("socks5", "127.0.0.1", 1080)),
        ("SOCKS5://proxy.example/", ProxyUrl("socks5", "proxy.example", 1080)),
        ("socks5h://[2001:db8::1]:9", ProxyUrl("socks5h", "2001:db8::1", 9)),
        ("socks5://[::1]", ProxyUrl("socks5", "::1", 1080)),
        ("socks5://user:p%40ss%3A%2F@h:1", ProxyUrl("socks5", "h", 1, "user", "p@ss:/")),
        ("user:pa:ss@h", ProxyUrl("socks5", "h", 1080, "user", "pa:ss")),
        ("direct://", ProxyUrl("direct")),
        ("reject://", ProxyUrl("reject")),
        ("socks4://me@h", ProxyUrl("socks4", "h", 1080, "me")),
        ("SOCKS4A://h:9/", ProxyUrl("socks4a", "h", 9)),
        ("http://u:p%3A@h", ProxyUrl("http", "h", 80, "u", "p:")),
        ("http://[::1]:3128", ProxyUrl("http", "::1", 3128)),
        ("https://u@h", ProxyUrl("https", "h", 443, "u")),
        ("socks5+tls://h", ProxyUrl("socks5+tls", "h", 1080)),
        ("socks5+ws://u:p@h", ProxyUrl("socks5+ws", "h", 80, "u", "p")),
        ("socks5+wss://h:8443/ws?path=1", ProxyUrl("socks5+wss", "h", 8443, path="/ws?path=1")),
        ("socks5+http://h/", ProxyUrl("socks5+http", "h", 80)),
    ],
)
def test_proxy_urls(url: str, proxy: ProxyUrl) -> None:
    assert parse_proxy(url) == proxy
    assert parse_proxy(proxy.url()) == proxy


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"proxy": "socks5://h", "tls-ca": "ca.pem"},
            "tls-ca: socks5:// is not TLS, allowed is https:// or",
        ),
        ({"proxy": "socks5+ws://h", "tls-server-name": "n"}, "tls-server-name: socks5+ws:// is not TLS"),
        ({"proxy": "https://h", "tls-key": "key.pem"}, "tls-key needs tls-cert"),
    ],
)
def test_tls_keys_without_tls(flags: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(env={}, flags=flags)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("scheme", "modes"), [("socks5", "udp gost hev uot"), ("http", "uot"), ("socks4", "")])
def test_modes_of_udp_that_a_kind_of_proxy_can_have(scheme: str, modes: str) -> None:
    for mode in ("auto", "udp", "gost", "hev", "uot"):
        flags = {"proxy": f"{scheme}://h", "udp-mode": mode}
        if mode in ("auto", *modes.split()):
            assert load(env={}, flags=flags).udp_mode == mode
        else:
            with pytest.raises(ConfigError, match=f"udp-mode {mode}: {scheme}:// cannot carry it, allowed is auto"):
                load(env={}, flags=flags)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("trojan://h", "trojan:// is not supported yet: allowed are socks5://, socks5h://, socks4://"),
        ("socks5+ws://h/a b", "the path holds characters that must be percent-encoded"),
        ("socks5+tls://h/path", "is neither an address nor a host name"),
        ("https://u%3Av@h", "the user name holds a colon"),
        ("ss://h", "ss:// is not supported yet"),
        ("sock5://h", "unknown scheme sock5://"),
        ("socks5://", "no host"),
        ("h:", "no port follows the colon"),
        ("h:0", "port '0'"),
        ("h:65536", "port '65536'"),
        ("h:x", "port 'x'"),
        ("2001:db8::1", "an IPv6 address stands in brackets"),
        ("[::1", "brackets hold"),
        ("[::1]x", "brackets hold"),
        ("[1.2.3.4]:1", "brackets hold"),
        ("300.1.1.1", "is neither an address nor a host name"),
        ("a b", "is neither an address nor a host name"),
        ("h/path", "is neither an address nor a host name"),
        ("@h", "no user name stands before the @"),
        ("u:%zz@h", "the password holds a % that starts no percent-encoding"),
        ("u:%ff@h", "the password is not UTF-8"),
        ("u:" + "x" * 256 + "@h", "the password has 256 bytes"),
        ("direct://h", "direct:// takes no address"),
        ("reject://h", "reject:// takes no address"),
        ("socks4://u:secret@h", "socks4 has a user id but no password: write socks4://USER@HOST:PORT"),
        ("socks4a://u%00@h", "the user id holds a zero byte"),
        ("http://u%3Av:secret@h", "the user name holds a colon"),
    ],
)
def test_proxy_urls_that_are_none(url: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_proxy(url)
    assert sentence in str(caught.value)


_CREDENTIAL = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)


@given(_CREDENTIAL, _CREDENTIAL, st.integers(1, 65535))
def test_a_url_read_back_is_the_same(username: str, password: str, port: int) -> None:
    proxy = ProxyUrl("socks5", "2001:db8::1", port, username, password)
    assert parse_proxy(proxy.url()) == proxy
    assert parse_proxy(str(proxy)) == ProxyUrl("socks5", "2001:db8::1", port, username)


@given(st.text(max_size=40))
def test_any_text_is_a_proxy_or_refused(text: str) -> None:
    try:
        proxy = parse_proxy(text)
    except ConfigError:
        return
    assert parse_proxy(proxy.url()) == proxy


# -- secrets --


def test_a_password_comes_from_the_highest_layer(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from file\nsecond line\n")
    path = written(tmp_path, 'proxy = "alice@h:1"\npassword-file = "secret"\n')
    assert parse_proxy(load(path, {}, {}).proxy) == ProxyUrl("socks5", "h", 1, "alice", "from file")
    env = {"RINGWAY_PASSWORD": "from:environment"}
    assert parse_proxy(load(path, env, {}).proxy).password == "from:environment"
    assert parse_proxy(load(path, env, {"proxy": "bob@i"}).proxy).password == "from:environment"
    assert parse_proxy(load(path, env, {"proxy": "bob:flag@i"}).proxy).password == "flag"
    assert parse_proxy(load(path, env, {"password-file": str(secret)}).proxy).password == "from file"
    assert parse_proxy(load(path, {"RINGWAY_PROXY": "carol:url@i"} | env, {}).proxy).password == "url"


def test_a_password_of_a_lower_layer_is_not_given_to_another_proxy(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = written(tmp_path, 'proxy = "alice@h:1"\npassword-file = "secret"\n')
    assert parse_proxy(load(path, {}, {"proxy": "other:9"}).proxy) == ProxyUrl("socks5", "other", 9)
    assert load(path, {"RINGWAY_PASSWORD": "x"}, {"proxy": "direct://"}).proxy == "direct://"


def test_systemd_credential(tmp_path: Path) -> None:
    (tmp_path / "ringway-password").write_text("credential")
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    path = written(tmp_path, 'proxy = "alice@h"\n')
    assert parse_proxy(load(path, env, {}).proxy).password == "credential"
    assert parse_proxy(load(path, env | {"RINGWAY_PASSWORD": "p"}, {}).proxy).password == "p"
    assert load(path, {"CREDENTIALS_DIRECTORY": str(tmp_path / "none")}, {}).proxy == "alice@h"


def test_passwords_that_cannot_be_used(tmp_path: Path) -> None:
    assert refused(env={"RINGWAY_PASSWORD": "geheim"}).startswith(
        "RINGWAY_PASSWORD holds a password, but proxy names no user"
    )
    assert "cannot read it: No such file" in refused({"proxy": "a@h", "password-file": str(tmp_path / "none")})
    (tmp_path / "empty").write_text("\n")
    assert "its first line is empty" in refused({"proxy": "a@h", "password-file": str(tmp_path / "empty")})
    assert "more than 255 bytes" in refused({"proxy": "a@h"}, {"RINGWAY_PASSWORD": "x" * 256})


def test_a_password_is_never_shown() -> None:
    config = load(None, {}, {"proxy": "socks5://alice:geheim@h:1"})
    assert config.public()["proxy"] == "socks5://alice@h:1"
    for shown in (repr(config), repr(parse_proxy(config.proxy)), str(parse_proxy(config.proxy))):
        assert "geheim" not in shown


# -- the control socket --


def test_control_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert control_path(Config(), "tun0", {}) == Path("/run/ringway/tun0.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert control_path(Config(), "tun0", {}) == Path("/tmp/ringway-1000/tun0.sock")
    assert control_path(Config(), "tun0", {"XDG_RUNTIME_DIR": "/run/user/1000"}) == Path(
        "/run/user/1000/ringway/tun0.sock"
    )
    assert Path("/run/ringway") in control_directories({})
    assert control_path(Config(control="/x/y"), "tun0", {}) == Path("/x/y")
