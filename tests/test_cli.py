"""The command line: what is accepted, in which spelling, and the one line for what is not."""

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gateway import __version__
from gateway.__main__ import main
from gateway.cli.arguments import with_subcommand, with_two_dashes
from gateway.cli.run import start_logging
from gateway.config import Config
from gateway.keys import KEYS
from gateway.status import StatusError, ask, rates, traffic

SUBCOMMANDS = ("run", "check")
VALUED = {"-p", "--proxy", "--local-socks-addr", "-d", "--device", "--tun-device", "--mtu", "-c", "--config"}
BOOLEANS = {"--public-only"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], ["--help"]),
        (["-help"], ["--help"]),
        (["--version"], ["--version"]),
        (["-version"], ["--version"]),
        (["-h"], ["-h"]),
        (["run", "-p", "x"], ["run", "-p", "x"]),
        (["-tun-device", "tun0"], ["run", "-tun-device", "tun0"]),
        (["--proxy=x"], ["run", "--proxy=x"]),
        (["-p", "x"], ["run", "-p", "x"]),
        (["rnu"], ["rnu"]),
    ],
)
def test_flags_without_a_subcommand_run(given: list[str], meant: list[str]) -> None:
    assert with_subcommand(given, SUBCOMMANDS) == meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("-tun-device tun0", "--tun-device tun0"),
        ("--tun-device=tun0", "--tun-device=tun0"),
        ("-tun-device=tun0", "--tun-device=tun0"),
        ("-local-socks-addr 127.0.0.1:1080 -mtu 1400", "--local-socks-addr 127.0.0.1:1080 --mtu 1400"),
        ("-p socks5://h -d tun://t", "-p socks5://h -d tun://t"),
        ("-p=socks5://h", "-p socks5://h"),
        ("-psocks5://h", "-psocks5://h"),
        ("-c/etc/x.toml", "-c/etc/x.toml"),
        ("-public-only", "--public-only=true"),
        ("-public-only=true", "--public-only=true"),
        ("--public-only=false", "--public-only=false"),
        ("-public-only true", "--public-only=true true"),  # as in Go, true is no value here
        ("-public-only -mtu 1400", "--public-only=true --mtu 1400"),
        ("-mtu -public-only", "--mtu -public-only"),  # the value of --mtu, however wrong
        ("-mtu -5", "--mtu -5"),
        ("-proxi=socks5://h", "--proxi=socks5://h"),
        ("-unknown", "--unknown"),
        ("-- -mtu", "-- -mtu"),
        ("-", "-"),
    ],
)
def test_spelling_of_go(given: str, meant: str) -> None:
    assert with_two_dashes(given.split(), VALUED, BOOLEANS) == meant.split()


# -- what the commands get --


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Config]]:
    """Stand in for the supervisor; yields the configurations that it was started with."""
    configs: list[Config] = []

    class DeviceError(Exception):
        pass

    class Supervisor:
        def __init__(self, config: Config) -> None:
            configs.append(config)

        def run(self) -> int:
            if configs[-1].device == "tun://busy":
                raise DeviceError("tun://busy is in use:\n end the program that has it")
            return 1 if configs[-1].device == "tun://fails" else 0

    stand_in = type(sys)("gateway.supervisor")
    stand_in.Supervisor = Supervisor  # type: ignore[attr-defined]
    device = type(sys)("gateway.device")
    device.DeviceError = DeviceError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gateway.supervisor", stand_in)
    monkeypatch.setitem(sys.modules, "gateway.device", device)
    monkeypatch.setattr("gateway.cli.run.raise_descriptor_limit", lambda: None)
    monkeypatch.setattr("gateway.cli.run.start_logging", lambda loglevel: None)
    yield configs


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, which must refuse with exit code 2 and one line; return the line."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ringway: ") and err.count("\n") == 1
    return err.removeprefix("ringway: ").rstrip("\n")


def test_gotun2socks_command_line(ran: list[Config]) -> None:
    arguments = (
        "-tun-device tun7 -tun-address 10.0.0.2 -tun-mask 255.255.255.0 -tun-gw 10.0.0.1 -tun-dns 8.8.8.8,8.8.4.4 "
        "-local-socks-addr 127.0.0.1:1081 -public-only -enable-dns-cache=true"
    )
    assert main(arguments.split()) == 0
    assert main(["run", *("-" + one if one.startswith("-") else one for one in arguments.split())]) == 0
    assert ran[0] == ran[1]
    config = ran[0]
    assert (config.device, config.proxy) == ("tun://tun7", "127.0.0.1:1081")
    assert (config.tun_address, config.tun_mask, config.tun_gw) == ("10.0.0.2", "255.255.255.0", "10.0.0.1")
    assert (config.tun_dns, config.public_only, config.enable_dns_cache) == (["8.8.8.8", "8.8.4.4"], True, True)


def test_every_key_has_a_flag_that_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in KEYS:
        assert key.flag in text
        assert f"[key: {key.name};" in text
        assert f"env: {key.variable};" in text
    assert "default: socks5://127.0.0.1:1080]" in text
    assert "default: 198.18.0.1]" in text


def test_configuration_file_by_flag_and_variable(
    ran: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ringway.toml"
    file.write_text("mtu = 1400\n")
    assert main(["-c", str(file), "-fwmark", "0x22b"]) == 0
    monkeypatch.setenv("RINGWAY_CONFIG", str(file))
    monkeypatch.setenv("RINGWAY_WORKERS", "3")
    assert main(["run"]) == 0
    assert [(config.mtu, config.fwmark, config.workers) for config in ran] == [(1400, 555, 0), (1400, 0, 3)]


def test_exit_codes_of_run(ran: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 0
    assert main(["-d", "fails"]) == 1
    assert refused(capsys, "-d", "busy") == "tun://busy is in use: end the program that has it"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("-mtu 99", "--mtu 99: allowed is a whole number from 576 to 65535"),
        ("-mtu -5", "--mtu -5: allowed is a whole number from 576 to 65535"),
        ("run --tun-devcie t", "No such option '--tun-devcie'"),
        ("-tun-devcie t", "No such option '--tun-devcie'"),
        ("run extra", "Got unexpected extra argument (extra)"),
        ("-public-only true", "Got unexpected extra argument (true)"),
        ("-public-only=perhaps", "--public-only perhaps: allowed is true or false"),
        ("run -p", "Option '-p' requires an argument"),
        ("run -p trojan://h", "--proxy: trojan:// is not supported yet"),
        ("rnu", "no command 'rnu'; the nearest one is run, allowed are run, exec, proxy, check, status"),
        ("-c /nowhere/x.toml", "/nowhere/x.toml: cannot read the configuration: No such file or directory"),
        ("check --target h", "--target h: allowed is HOST:PORT"),
        ("check --require everything", "Invalid value for '--require'"),
        ("status --interval no", "Invalid value for '--interval'"),
    ],
)
def test_usage_errors_are_one_line(
    ran: list[Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert refused(capsys, *arguments.split()).startswith(sentence)
    assert ran == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: ringway" in capsys.readouterr().out
    for spelling in ("--version", "-version", "-v"):
        assert main([spelling]) == 0
        assert capsys.readouterr().out == f"ringway {__version__}\n"


def test_nobody_reads_on() -> None:
    """`ringway … | head` says nothing; the exit code may be click's, 1."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "run", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode in (0, 1) and done.stderr == b""


def test_run_imports_nothing_that_prints() -> None:
    """The daemon is forked from what `run` imported: neither rich nor a probe's libraries may be in it."""
    program = (
        "import sys\n"
        "from gateway.__main__ import main\n"
        "main(['run', '--help'])\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'rich', 'dpkt', 'socks', 'pytest'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"


def test_loglevels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    try:
        for loglevel, lines in (("debug", 4), ("info", 3), ("warn", 2), ("error", 1), ("silent", 0)):
            start_logging(loglevel)
            for log in (root.debug, root.info, root.warning, root.error):
                log("line")
            assert capsys.readouterr().err.count("line\n") == lines
        start_logging("info")
        root.warning("as journald wants it")
        assert capsys.readouterr().err == "WARN as journald wants it\n"
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


# -- status --

STATUS = {
    "version": __version__,
    "uptime": 3661.0,
    "device": {"name": "tun0", "mtu": 1500, "features": 63},
    "proxy": "socks5://alice@127.0.0.1:1080",
    "placement": "pipeline",
    "processes": [
        {
            "role": "supervisor",
            "shard": None,
            "pid": 10,
            "state": "running",
            "restarts": 0,
            "cpu_seconds": 0.1,
            "pss": 9 << 20,
        },
        {
            "role": "worker",
            "shard": 0,
            "pid": 11,
            "state": "running",
            "restarts": 2,
            "cpu_seconds": 7.25,
            "pss": 1 << 20,
        },
    ],
    "counters": {"worker/0": {"bytes_from_device": 1000, "frames_from_device": 2, "malformed": 0, "tcp_opened": 1234}},
    "flows": {"tcp": 5, "udp": 6},
}


class Answering:
    """A control socket that gives the same bytes to everybody who asks."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self.answer = answer
        self.requests: list[Any] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                head = connection.recv(4, socket.MSG_WAITALL)
                if len(head) == 4:
                    (length,) = struct.unpack(">I", head)
                    self.requests.append(msgpack.unpackb(connection.recv(length, socket.MSG_WAITALL)))
                    connection.sendall(self.answer)

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *exception: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


def framed(answer: object) -> bytes:
    body: bytes = msgpack.packb(answer)
    return struct.pack(">I", len(body)) + body


def test_status_in_tables_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tun0.sock"
    with Answering(path, framed(STATUS)) as gateway:
        assert main(["status", "--control", str(path), "--interval", "0.05"]) == 0
        text = capsys.readouterr().out
        for word in (
            "tun0 mtu 1500",
            "socks5://alice@127.0.0.1:1080",
            "1h 1m",
            "worker",
            "9.0 MiB",
            "tcp_opened",
            "1,234",
        ):
            assert word in text
        assert "malformed" not in text
        assert main(["status", "--control", str(path), "--interval", "0.05", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["counters"] == STATUS["counters"]
        assert answer["traffic"]["bytes_up"] == 1000
        assert answer["rates"]["bytes_up"] == 0
        assert gateway.requests == [{"command": "status"}] * 4


def test_status_finds_the_only_instance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.status.control_directories", lambda: [tmp_path, tmp_path / "none"])
    assert main(["status"]) == 1
    assert capsys.readouterr().err.startswith("ringway: no gateway runs here")
    with Answering(tmp_path / "a.sock", framed(STATUS)):
        left_behind = socket.socket(socket.AF_UNIX)
        left_behind.bind(str(tmp_path / "dead.sock"))
        left_behind.close()
        assert main(["status", "--interval", "0.05"]) == 0
        with Answering(tmp_path / "b.sock", framed(STATUS)):
            capsys.readouterr()
            assert "name one by --control" in refused(capsys, "status")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "closed the connection before it had answered"),
        (b"\0\0\0\x09x", "closed the connection before it had answered"),
        (struct.pack(">I", 1 << 31), "announces 2147483648 bytes"),
        (b"\0\0\0\x01\xc1", "is not msgpack"),
        (framed([1]), "is not a map"),
        (framed({"error": "no such command"}), "no such command"),
    ],
)
def test_answers_that_cannot_be_used(tmp_path: Path, answer: bytes, sentence: str) -> None:
    with Answering(tmp_path / "s", answer), pytest.raises(StatusError, match=sentence):
        ask(tmp_path / "s", {"command": "status"}, timeout=2)


def test_a_gateway_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(StatusError, match=r"no answer in 0\.1 s"):
            ask(tmp_path / "s", {"command": "status"}, timeout=0.1)


def counted(*owners: tuple[str, dict[str, int]]) -> dict[str, Any]:
    return {"counters": dict(owners)}


def test_traffic_is_counted_once() -> None:
    workers = [("worker/0", {"bytes_from_device": 3, "bytes_to_device": 5}), ("worker/1", {"bytes_from_device": 4})]
    assert traffic(counted(*workers)) == {"bytes_up": 7, "bytes_down": 5, "frames_up": 0, "frames_down": 0}
    assert traffic(counted(("reader", {"bytes_from_device": 8}), *workers))["bytes_up"] == 8
    assert traffic({}) == dict.fromkeys(("bytes_up", "bytes_down", "frames_up", "frames_down"), 0)


def test_rates_survive_a_replaced_process() -> None:
    assert rates({"a": 10, "b": 10}, {"a": 30, "b": 4}, 2.0) == {"a": 10.0, "b": 2.0}


def test_main_takes_any_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Sequence[str] = ("--version",)
    assert main(arguments) == 0
