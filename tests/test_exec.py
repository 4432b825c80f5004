"""The command line of `ringway exec`, and the reasons that a kernel may have to refuse."""

import errno

import pytest

from gateway import namespace
from gateway.cli import execute
from gateway.cli.exec import part, quieter
from gateway.config import load

VALUED = {"-p", "--proxy", "--tun-dns", "-c", "--config"}


@pytest.mark.parametrize(
    ("arguments", "ours", "command"),
    [
        (["--", "curl", "-sI", "x"], [], ["curl", "-sI", "x"]),
        (["curl", "-p", "x", "--", "y"], [], ["curl", "-p", "x", "--", "y"]),
        (["-p", "socks5://h:1", "git", "log", "--", "f"], ["-p", "socks5://h:1"], ["git", "log", "--", "f"]),
        (["-p", "h:1", "--", "-odd"], ["-p", "h:1"], ["-odd"]),
        (["--proxy=h:1", "ls", "-l"], ["--proxy=h:1"], ["ls", "-l"]),
        (["-tun-dns", "1.1.1.1", "dig"], ["-tun-dns", "1.1.1.1"], ["dig"]),
        (["-public-only", "dig"], ["-public-only"], ["dig"]),
        (["--public-only", "-p", "h:1", "dig"], ["--public-only", "-p", "h:1"], ["dig"]),
        (["-p"], ["-p"], []),
        ([], [], []),
        (["--help"], ["--help"], []),
    ],
)
def test_the_command_begins_after_the_options(arguments, ours, command):
    assert part(arguments, VALUED) == (ours, command)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "exec needs a command"),
        (["-p", "socks5://127.0.0.1:1080"], "exec needs a command"),
        (["--nonsense", "--", "true"], "--nonsense"),
        (["-p", "gopher://x", "--", "true"], "gopher"),
        (["-d", "fd://0", "--", "true"], "exec makes a device of its own"),
        (["--mtu", "12", "--", "true"], "--mtu 12"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(capfd, arguments, says):
    assert execute(["exec", *arguments]) == 2
    captured = capfd.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_terminal_is_the_commands():
    assert quieter(load(None, {}, {})).loglevel == "warn"
    assert quieter(load(None, {}, {"loglevel": "debug"})).loglevel == "debug"
    assert quieter(load(None, {}, {"loglevel": "silent"})).loglevel == "silent"


@pytest.mark.parametrize(
    ("switches", "number", "says"),
    [
        ({"user/max_user_namespaces": "0"}, errno.ENOSPC, "sysctl -w user.max_user_namespaces=10000"),
        ({"kernel/unprivileged_userns_clone": "0"}, errno.EPERM, "kernel.unprivileged_userns_clone=1"),
        (
            {"kernel/apparmor_restrict_unprivileged_userns": "1"},
            errno.EPERM,
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ({}, errno.ENOSPC, "too many namespaces"),
        ({}, errno.EPERM, "run as root"),
        ({}, errno.EINVAL, "CONFIG_USER_NS"),
        ({}, errno.ENOMEM, "cannot make the namespaces"),
    ],
)
def test_a_kernel_that_refuses_is_told_how_to_allow(monkeypatch, switches, number, says):
    def refuse(flags):
        raise OSError(number, "no", "unshare")

    monkeypatch.setattr(namespace, "_unshare", refuse)
    monkeypatch.setattr(namespace, "_switch", lambda key: switches.get(key, ""))
    with pytest.raises(namespace.NamespaceError) as caught:
        namespace.enter()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
