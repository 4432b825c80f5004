"""sd_notify over real sockets, by path and by abstract name."""

import os
import socket
from pathlib import Path

import pytest

from gateway.notify import notify


def test_states_arrive_one_datagram_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify("READY=1")
        assert notify("STATUS=4 workers, Größe")
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == "STATUS=4 workers, Größe".encode()


def test_abstract_names(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"ringway-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        assert notify("STOPPING=1")
        assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1234", "/nowhere/notify"])
def test_nobody_listens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify("READY=1") is False


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert any(not notify("STATUS=busy") for _ in range(10_000))
