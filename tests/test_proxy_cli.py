"""`ringway proxy` as a process: what it prints, how it ends, and how it lives with few descriptors."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gateway.cli.proxy import BadUsage, parse_listen
from tests.certificates import CA, LOCALHOST
from tests.proxy_running import PATIENCE, accept, ask, exactly, listening
from workers.socks.wire import CONNECT

ROOT = Path(__file__).parent.parent


def command(*arguments, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RINGWAY_")} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "gateway", "proxy", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(*arguments, **environment):
    """Run the command until the block ends; gives the process and where it listens."""
    with command("--listen", "127.0.0.1:0", *arguments, **environment) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:"), process.stderr.read()
            yield process, ("127.0.0.1", int(line.rpartition(":")[2]))
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_and_stops_with_0(number):
    with listening() as listener, running() as (process, address):
        with socket.create_connection(address, timeout=PATIENCE) as client:
            assert ask(client, CONNECT, b"\x7f\x00\x00\x01", listener.getsockname()[1]).reply == 0
            with accept(listener) as server:
                process.send_signal(number)
                assert process.wait(PATIENCE) == 0
                assert server.recv(1) == b""
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--listen", "nonsense:1"], "ADDR:PORT"),
        (["--listen", "127.0.0.1:65536"], "0…65535"),
        (["--listen", "192.0.2.1:1080"], "cannot listen on 192.0.2.1:1080"),
        (["--bogus"], "--bogus"),
        (["--listen", "socks5+tls://:0"], "--listen-cert"),
        (["--listen-cert", "/etc/hosts"], "no PEM"),
        (["--listen-ca", "/etc/hosts"], "--listen-cert"),
        (["--via", "http://localhost"], "--forward"),
        (["--forward", "http://localhost"], "socks5+ws://"),
        (["--forward", "socks5://user:secret@localhost:x"], "'x'"),
        (["--forward", "socks5://localhost", "--tls-ca", "/no/such/file"], "--tls-ca means nothing"),
        (["--forward", "socks5+tls://localhost", "--tls-ca", "/no/such/file"], "No such file"),
        (["--forward", "socks5+tls://localhost", "--tls-key", "/no/such/file"], "--tls-cert"),
        (["--forward", "socks5://localhost", "--via", "direct://"], "socks4a://"),
        (["--forward", "socks5://localhost", "--socks-tls", "aes-256-cfb"], "'gost-v1'"),
        (["--user", "me"], "--password-file"),
        (["--user", "me", "--password-file", "/no/such/file"], "/no/such/file"),
        (["--loglevel", "loud"], "'debug'"),
    ],
)
def test_bad_usage_is_one_line_and_2(arguments, word):
    with command(*arguments) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert word in err


@pytest.mark.parametrize("by", ["file", "environment"])
def test_the_password_need_not_stand_in_the_command_line(tmp_path, by):
    secret = tmp_path / "secret"
    secret.write_text("geheim\n")
    arguments = ("--password-file", str(secret)) if by == "file" else ()
    environment = {} if by == "file" else {"RINGWAY_PROXY_PASSWORD": "geheim"}
    with listening() as listener, running("--user", "me", *arguments, **environment) as (_, address):
        with socket.create_connection(address, timeout=PATIENCE) as client:
            assert ask(client, CONNECT, b"\x7f\x00\x00\x01", listener.getsockname()[1], "me", "geheim").reply == 0
        with socket.create_connection(address, timeout=PATIENCE) as client:
            client.sendall(b"\x05\x01\x00")
            assert exactly(client, 2) == b"\x05\xff"


def test_an_open_proxy_warns_in_one_line():
    with command("--listen", "0.0.0.0:0") as process:
        try:
            assert process.stdout.readline().startswith("listening on 0.0.0.0:")
            process.terminate()
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert err.count("\n") == 1
    assert "no password is set" in err


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:1", ("raw", "127.0.0.1", 1)),
        ("127.0.0.1", ("raw", "127.0.0.1", 1080)),
        (":8080", ("raw", "127.0.0.1", 8080)),
        ("[::1]:9", ("raw", "::1", 9)),
        ("[::1]", ("raw", "::1", 1080)),
        ("::1", ("raw", "::1", 1080)),
        ("localhost:0", ("raw", "localhost", 0)),
        ("socks5+ws://:8080", ("ws", "127.0.0.1", 8080)),
        ("socks5+wss://[::1]", ("wss", "::1", 443)),
        ("SOCKS5+TLS://127.0.0.1/", ("tls", "127.0.0.1", 1080)),
    ],
)
def test_listen_addresses(text, listen):
    assert parse_listen(text) == listen


@pytest.mark.parametrize(
    "text", ["[::1", "[::1]9", "example.com:1", "127.0.0.1:x", "127.0.0.1:-1", "1.2.3:4", "socks5+ws://:1/x", "ws://:1"]
)
def test_listen_addresses_that_are_none(text):
    with pytest.raises(BadUsage):
        parse_listen(text)


def test_two_of_them_in_a_row():
    far_end = running("--listen", "socks5+wss://127.0.0.1:0", "--listen-cert", LOCALHOST)
    with listening() as listener, far_end as (_, far):
        url = f"socks5+wss://localhost:{far[1]}"
        with (
            running("--forward", url, "--tls-ca", CA, "--udp-mode", "hev") as (_, near),
            socket.create_connection(near, timeout=PATIENCE) as client,
        ):
            assert ask(client, CONNECT, b"\x7f\x00\x00\x01", listener.getsockname()[1]).reply == 0
            accept(listener).close()


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_out_of_descriptors_new_clients_wait_without_a_spin():
    with listening() as listener, running() as (process, address):
        figures = psutil.Process(process.pid)
        limit = 40
        figures.rlimit(psutil.RLIMIT_NOFILE, (limit, limit))
        clients = [socket.create_connection(address, timeout=PATIENCE) for _ in range(2 * limit)]
        deadline = time.monotonic() + PATIENCE
        while figures.num_fds() < limit and time.monotonic() < deadline:
            os.sched_yield()
        before = sum(figures.cpu_times()[:2])
        clients[0].settimeout(0.5)
        with pytest.raises(TimeoutError):  # nothing for it to do meanwhile
            clients[0].recv(1)
        assert sum(figures.cpu_times()[:2]) - before < 0.2
        # Served, but without a descriptor for the target: a general failure.
        clients[0].settimeout(PATIENCE)
        assert ask(clients[0], CONNECT, b"\x7f\x00\x00\x01", listener.getsockname()[1]).reply == 1
        for client in clients[: limit + limit // 2]:
            client.close()
        # Those who waited are served as soon as there is room.
        assert ask(clients[-1], CONNECT, b"\x7f\x00\x00\x01", listener.getsockname()[1]).reply == 0
        for client in clients:
            client.close()
