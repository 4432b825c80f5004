"""`python -m gateway.demo`: real traffic through the gateway, shown, checked and summed up; `--shell CMD`: your own.

Exit codes: 0 everything was right (with --shell: the command's own), 1 something was not, 2 this machine forbids it.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, Final

import click

from gateway.config import Config, load
from gateway.demo import WORLD4, WORLD6
from gateway.lifeline import python_environment, python_module, spawn
from gateway.status import StatusError, traffic

if TYPE_CHECKING:
    from gateway.demo.show import Board

START_PATIENCE: Final = 20.0  #: seconds until the proxy and the servers listen
TRAFFIC_PATIENCE: Final = 60.0  #: seconds for all traffic; it takes about twelve
_FIGURES_EVERY: Final = 0.5  #: seconds


class DemoError(Exception):
    """A part of the demonstration did not come up; the text is one line."""

    exit_code = 1


def steps_for(config: Config, ipv6: bool) -> list[dict[str, Any]]:
    """Return the traffic, in order: kinds as client.py names them."""
    families = [("IPv4", WORLD4, config.tun_gw, 1.0)]
    if ipv6:
        families.append(("IPv6", WORLD6, config.tun_gw6, 0.5))
    return [
        {"kind": kind, "family": family, "address": own if kind == "ping" else world, "amount": amount}
        for family, world, own, share in families
        for kind, amount in (
            ("ping", int(20 * share)),
            ("TCP up", 2.0 * share),
            ("TCP down", 2.0 * share),
            ("TCP connections", int(200 * share)),
            ("UDP echo", int(2000 * share)),
        )
    ]


@contextlib.contextmanager
def embedded_proxy() -> Iterator[str]:
    """Run `ringway proxy` on a free loopback port; its URL. Raises DemoError."""
    process, line = spawn(["proxy", "--listen", "127.0.0.1:0", "--loglevel", "warn"], stdout=subprocess.PIPE)
    try:
        words = _first_line(process, "the proxy").split()
        yield f"socks5://{words[-1]}"
    finally:
        os.close(line)
        _end(process)


@contextlib.contextmanager
def servers() -> Iterator[None]:
    """Run the targets; they go when their standard input ends."""
    process = subprocess.Popen(
        python_module("gateway.demo.servers"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=python_environment(),
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        _first_line(process, "the servers")
        yield
    finally:
        process.stdin.close()
        _end(process)


def _first_line(process: "subprocess.Popen[bytes]", what: str) -> str:
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    line = process.stdout.readline() if poll.poll(START_PATIENCE * 1000) else b""
    if not line:
        raise DemoError(f"{what} did not come up")
    return line.decode().strip()


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def show_traffic() -> int:
    """Build the two namespaces, move the traffic, show it, and sum it up."""
    from gateway.addresses import add_to_loopback
    from gateway.demo.show import Board, console, summary
    from gateway.namespace import enter

    enter()
    ipv6 = add_to_loopback(WORLD4, WORLD6)
    with servers(), embedded_proxy() as url:
        config = load(None, {}, {"proxy": url, "loglevel": "warn"})
        plan = steps_for(config, ipv6)
        with Board(console()) as board:
            board.say(f"Proxy {url}, targets {WORLD4}" + (f" and {WORLD6}" if ipv6 else "; this machine has no IPv6"))
            ended, carried = _move(config, plan, board)
    print(summary(ended))
    print(f"The gateway carried {carried['bytes_up'] / 1e6:,.0f} MB up and {carried['bytes_down'] / 1e6:,.0f} MB down.")
    wrong = [f"{step['step']}: {step['text']}" for step in ended if not step["ok"]]
    if len(ended) < len(plan):
        wrong.append(f"the client ended after {len(ended)} of {len(plan)} steps")
    for way in ("up", "down"):
        # Headers come on top, so less means that something found another way.
        moved = sum(step["moved"] for step in ended if step["step"].startswith(f"TCP {way}"))
        if carried[f"bytes_{way}"] < moved:
            wrong.append(f"{moved} octets went {way}, but the gateway saw {carried[f'bytes_{way}']}")
    if wrong:
        print("FAILED:", "; ".join(wrong))
        return 1
    print("Checked: streams by SHA-256 at both ends, the rest answer by answer, the sums by the gateway's counters.")
    return 0


def _move(config: Config, plan: list[dict[str, Any]], board: "Board") -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Run the client in an enclosure and show what it says; return each step's last word, and the gateway's sums."""
    from gateway.enclosure import Enclosure

    reading, writing = os.pipe()
    ended: list[dict[str, Any]] = []
    with open(reading, "rb", buffering=0) as stream, open(writing, "wb") as out:
        command = [*python_module("gateway.demo.client"), json.dumps(plan)]
        with Enclosure(config, command, stdout=writing) as enclosure:
            out.close()
            gateway = enclosure.gateway
            assert gateway is not None
            board.say(f"A command runs in a network namespace whose only way out is {config.device}.")
            for line in _lines(stream, TRAFFIC_PATIENCE):
                if line:
                    progress = json.loads(line)
                    board.step(progress)
                    if "ok" in progress:
                        ended.append(progress)
                else:
                    with contextlib.suppress(StatusError):
                        board.figures(gateway.status())
            enclosure.finish(5.0)
            carried = traffic(gateway.status())
    return ended, carried


def _lines(stream: IO[bytes], patience: float) -> Iterator[bytes]:
    """Yield the lines of a pipe, and b"" whenever it is time for new figures, until its end or that of patience."""
    give_up_at = time.monotonic() + patience
    figures_at = 0.0
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    rest = b""
    while (now := time.monotonic()) < give_up_at:
        if now >= figures_at:
            figures_at = now + _FIGURES_EVERY
            yield b""
        if poll.poll(max(figures_at - time.monotonic(), 0.0) * 1000):
            data = stream.read(65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from filter(None, lines)


def run_command(text: str) -> int:
    """Run a shell command through the embedded proxy, which stays in the machine's own network."""
    from gateway.enclosure import run_enclosed

    with embedded_proxy() as url:
        return run_enclosed(load(None, {}, {"proxy": url, "loglevel": "warn"}), ["/bin/sh", "-c", text])


@click.command()
@click.option("--shell", metavar="CMD", help="Run this command through the embedded proxy instead of the traffic.")
def main(shell: str | None) -> None:
    """Show what Ringway does, on embedded defaults; the machine's own network stays as it is."""
    from gateway.device import DeviceError
    from gateway.enclosure import EnclosureError
    from gateway.namespace import NamespaceError

    os.environ.update(python_environment())
    try:
        code = run_command(shell) if shell else show_traffic()
    except (DemoError, DeviceError, EnclosureError, NamespaceError, StatusError) as error:
        print("ringway:", error, file=sys.stderr)
        # 2 unless something that had begun went wrong.
        code = getattr(error, "exit_code", 1 if isinstance(error, StatusError) else 2)
    sys.exit(code)


if __name__ == "__main__":
    main(prog_name="python -m gateway.demo")
