"""Supervisor: makes the device and the shared memory, forks the rest, replaces what dies, answers, and stops.

    run()      rights, device, addresses, name of the proxy, shared memory, processes; then the loop; then undone again
    the loop   messages and ends of processes (tree.py), signals, the control socket, the proxy's name and health

It never touches a packet, has one thread, and sleeps while nothing happens, but for a look at the device.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from setproctitle import setproctitle

from gateway.abilities import ABILITY_EVENTS, DEFAULT_RESOLVER, AbilityProbe, find_abilities
from gateway.config import Config, control_path
from gateway.control import AlreadyRunning, ControlError, ControlServer
from gateway.cpus import usable_cpus
from gateway.device import Device, DeviceError, open_device, was_made
from gateway.figures import status
from gateway.health import ProxyHealth, ProxyProbe
from gateway.loop import EventLoop, has_ended, wait_readable
from gateway.notify import notify
from gateway.privileges import (
    identity_for,
    kernel_version,
    needed_capabilities,
    permitted_capabilities,
    probe_upstream_rights,
)
from gateway.process import Child, Process, Rights, Role, Setup, fork_child, make_processes, roles_for
from gateway.proxyurl import CARRIED, WITHOUT_PROXY, parse_proxy
from gateway.resolve import Addresses, NameLookup
from gateway.settings import has_ipv6, proxy_name, settings_from
from gateway.tree import ProcessTree, printable
from ipc.channel import Channel, ChannelClosed, Message
from ipc.memory import SharedMemory
from workers.socks import modes

if TYPE_CHECKING:
    from gateway.carrier import Carrier

log = logging.getLogger("ringway")

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: the others would end or stop a program that does not care
SIGNALS: Final = (
    *STOP_SIGNALS,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
LOOK_AT_DEVICE: Final = 5.0  #: seconds between two looks whether the device is still there
CONFIGURE_PATIENCE: Final = 20.0  #: seconds for the addresses of the device
Roles = Callable[[str], tuple[tuple[Role, ...], Callable[[int], dict[str, tuple[str, ...]]]]]


class Supervisor:
    """One run of the gateway."""

    def __init__(self, config: Config, *, roles: Roles = roles_for) -> None:
        """Take the configuration; `roles` is the table of processes of a placement."""
        self.config = config
        self._roles_for = roles
        self._proxy = parse_proxy(config.proxy)
        self._started_at = time.monotonic()
        self._loop: EventLoop
        self._device: Device
        self._tree: ProcessTree
        self._setup: Setup
        self._rights = Rights()
        self._lookup: NameLookup | None = None
        self._probe: ProxyProbe | None = None
        self._abilities: AbilityProbe | None = None
        self._carrier: Carrier | None = None
        self._health: ProxyHealth
        #: whose descriptors no child may keep
        self._private: list[EventLoop | ControlServer | NameLookup | ProxyProbe | AbilityProbe | ProcessTree] = []
        self._ipv6 = False

    def run(self) -> int:
        """Run until stopped; return 0 if that was asked for, else 1. ConfigError, DeviceError: nothing was started."""
        config = self.config
        # Also hides the command line, which may hold the proxy's password.
        setproctitle("ringway: supervisor")
        if os.environ.get("PYTHONHASHSEED", "random") != "random":
            log.warning("PYTHONHASHSEED is set: whoever knows it can aim all flows at one worker; unset it")
        probe_upstream_rights(config.fwmark, config.interface)
        version, permitted = kernel_version(), permitted_capabilities()
        self._rights = Rights(
            identity_for(config.user), needed_capabilities(config.fwmark, config.interface, version, permitted)
        )
        with ExitStack() as undo:
            loop = self._loop = undo.enter_context(EventLoop())
            self._private.append(loop)
            # From now on a signal is noted; the loop acts on it when it runs.
            loop.catch(SIGNALS, self._signalled)
            self._health = ProxyHealth(loop, proxy_name(self._proxy), self._ask_abilities)
            if self._proxy.scheme in CARRIED:
                from gateway.carrier import Carrier

                self._carrier = Carrier(config)
                undo.callback(self._carrier.close)
            self._device = open_device(config.device, mtu=config.mtu, offloads=config.offloads)
            undo.callback(self._device.close)
            self._open_control(undo)
            if self._proxy.scheme not in WITHOUT_PROXY:
                self._begin_lookup(undo)
            self._configure_device()
            self._make_tree()
            undo.callback(self._kill_children)
            return self._serve()

    # -- what is made before the first fork --

    def _open_control(self, undo: ExitStack) -> None:
        path = control_path(self.config, self._device.name)
        try:
            control = ControlServer(self._loop, path, self._answer)
        except AlreadyRunning:
            raise
        except ControlError as error:
            # A place that somebody chose must work; the usual one may be on a read-only disk.
            if self.config.control:
                raise
            log.warning("%s; going on without one", error)
        else:
            self._private.append(control)
            undo.callback(control.close)

    def _begin_lookup(self, undo: ExitStack) -> None:
        config, proxy = self.config, self._proxy
        lookup = NameLookup(self._loop, proxy.host, proxy.port, fork=self._fork_helper, on_change=self._new_addresses)
        self._probe = ProxyProbe(
            self._loop,
            self._health,
            lambda: lookup.addresses,
            timeout=config.connect_timeout,
            fwmark=config.fwmark,
            interface=config.interface,
        )
        self._private += [lookup, self._probe]
        undo.callback(self._probe.close)
        undo.callback(lookup.close)
        self._lookup = lookup
        lookup.begin()
        # What a carrier's proxy can do is the carrier's affair.
        udp = config.udp_mode == modes.AUTO and proxy.scheme in modes.DIALECTS_OF and self._carrier is None
        pipelined = config.pipelined_handshake == "auto" and proxy.scheme in ("socks5", "socks5h")
        if udp or pipelined:
            find = partial(
                find_abilities,
                proxy,
                timeout=config.connect_timeout,
                resolver=next(iter(config.tun_dns), DEFAULT_RESOLVER),
                udp=udp,
                pipelined=pipelined,
                fwmark=config.fwmark,
                interface=config.interface,
            )
            abilities = AbilityProbe(self._loop, self._fork_probe, lambda: find(lookup.addresses), self._use_abilities)
            self._private.append(abilities)
            undo.callback(abilities.close)
            self._abilities = abilities

    def _configure_device(self) -> None:
        """Give a device that we made its addresses, in a child: netlink's library would stay in memory for ever."""
        config = self.config
        self._ipv6 = has_ipv6(config, self._device.mtu)
        if not was_made(self._device):
            return
        name = self._device.name

        def configure(channel: Channel) -> None:
            from gateway.addresses import configure

            try:
                ipv6 = configure(
                    name,
                    mtu=config.mtu,
                    address=config.tun_address,
                    mask=config.tun_mask,
                    address6=config.tun_address6 if self._ipv6 else "",
                )
            except DeviceError as error:
                channel.send({"error": str(error)})
            else:
                channel.send({"ipv6": ipv6})

        answer = self._ask_helper("addresses", configure)
        if "error" in answer:
            raise DeviceError(str(answer["error"]))
        if self._ipv6 and not answer.get("ipv6"):
            log.warning("the device has no IPv6: it is switched off on this machine")

    def _ask_helper(self, label: str, main: Callable[[Channel], None]) -> Message:
        """Run `main` in a child with all rights, and return what it sends."""
        child = fork_child(label, main, let_go=self._let_go, drop_rights=False)
        try:
            if not wait_readable(child.pidfd, CONFIGURE_PATIENCE):
                child.kill()
                wait_readable(child.pidfd, 1.0)
            child.reap()
            answer = child.channel.receive()
        except ChannelClosed:
            answer = None
        finally:
            child.close()
        if answer is None or answer.get("event") == "failed":
            reason = answer["reason"] if answer else f"no answer within {CONFIGURE_PATIENCE:.0f} s"
            raise DeviceError(f"cannot configure the device {self._device.name}: {reason}")
        return answer

    def _make_tree(self) -> None:
        config = self.config
        roles, counter_names = self._roles_for(config.placement)
        shards = 1 if config.placement == "single" else config.workers or usable_cpus()
        names = counter_names(shards)
        addresses = self._lookup.wait() if self._lookup else []
        settings = settings_from(config, self._device.mtu, addresses)
        carrier = self._carrier
        if carrier is not None:
            roles = (*roles, carrier.role)
            names = {**names, carrier.role.block: carrier.counters}
            settings = carrier.settings(settings, config.pipelined_handshake != "no")
        cache_octets = 1 << config.dns_cache_size.bit_length() - 1 if config.enable_dns_cache else 0
        shared = SharedMemory(shards, names, cache_octets)
        self._setup = Setup(shared, self._device, settings)
        self._tree = ProcessTree(
            self._loop,
            make_processes(roles, shards),
            fork=self._fork,
            clear=self._clear,
            on_ready=self._ready,
            on_event=self._event,
            on_death=self._lost,
        )
        self._private.append(self._tree)

    # -- running --

    def _serve(self) -> int:
        tree = self._tree
        tree.start()
        self._watch_device()
        said = False
        while tree.exit_code is None:
            self._loop.run_once()
            if tree.stopping and not said:
                said = notify("STOPPING=1\nSTATUS=stopping") or True
        return tree.exit_code

    def _ready(self) -> None:
        config, device, shards = self.config, self._device, self._setup.shared.shards
        address = f"{config.tun_address}/{_prefix(config.tun_mask)}, " if was_made(device) else ""
        workers = "1 worker" if shards == 1 else f"{shards} workers"
        what = f"{device.name} ({address}MTU {device.mtu}) → {self._proxy}, {workers}, {config.placement}"
        log.info("ready: %s", what)
        notify(f"READY=1\nSTATUS={what}")
        # Without an address the lookup has warned, and the probe follows when there is one.
        if self._probe is not None and self._lookup is not None and self._lookup.addresses:
            self._probe.start()
            self._ask_abilities()

    def _signalled(self, number: signal.Signals) -> None:
        if number not in STOP_SIGNALS:
            log.info("%s ignored: this version cannot change while it runs", number.name)
            return
        log.info("%s: stopping%s", number.name, " at once" if self._tree.stopping else "")
        self._tree.stop()

    def _event(self, process: Process, message: Message) -> None:
        event = message.get("event")
        if event == "proxy-down":
            self._health.is_down(process, printable(message.get("reason", "")))
            if self._lookup is not None:
                self._lookup.refresh()
        elif event == "proxy-up":
            self._health.is_up()
        elif event == "proxy-error":
            self._health.answers_wrong(printable(message.get("text", "")))
        elif event in ABILITY_EVENTS and self._abilities is not None:
            self._abilities.learned(message)

    def _watch_device(self) -> None:
        """Look now and then: to wait for its end in epoll would make each of its packets a little slower."""
        self._end_without_device()
        self._loop.call_later(LOOK_AT_DEVICE, self._watch_device)

    def _end_without_device(self) -> None:
        if has_ended(self._device.fileno()):
            self._tree.fail(f"the device {self._device.name} is gone")

    def _lost(self, process: Process) -> None:
        self._health.forget(process)
        if process.role.keeps_device:
            self._end_without_device()

    def _new_addresses(self, addresses: Addresses) -> None:
        if self._carrier is None:
            self._setup = replace(self._setup, settings=replace(self._setup.settings, proxy_addresses=addresses))
            self._tell_workers({"do": "proxy-addresses", "addresses": [list(each) for each in addresses]})
        if self._probe is not None:
            self._probe.start()
        self._ask_abilities()

    def _ask_abilities(self) -> None:
        if self._abilities is not None:
            self._abilities.start()

    def _use_abilities(self, udp: str, pipelined: bool) -> None:
        pipelined = pipelined or self.config.pipelined_handshake == "yes"
        settings = replace(self._setup.settings, udp_found=udp, pipelined=pipelined)
        self._setup = replace(self._setup, settings=settings)
        self._tell_workers({"do": "proxy-abilities", "udp": udp, "pipelined": pipelined})

    def _tell_workers(self, message: Message) -> None:
        receivers = tuple(process.role.name for process in self._tree.processes if process.role.keeps_upstream_rights)
        self._tree.broadcast(message, receivers)

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        command = request.get("command")
        if command != "status":
            return {"error": f"unknown command {printable(command)!r}; known is: status"}
        return status(
            device=self._device,
            proxy=str(self._proxy),
            udp={"mode": self.config.udp_mode, "found": self._setup.settings.udp_found},
            pipelined=self._setup.settings.pipelined,
            placement=self.config.placement,
            started_at=self._started_at,
            processes=self._tree.processes,
            counters=self._setup.shared.counters,
        )

    # -- forks --

    def _fork(self, process: Process) -> Child:
        role, setup, carrier = process.role, self._setup, self._carrier

        def let_go() -> None:
            self._let_go()
            if carrier is not None and role.name != carrier.role.name:
                carrier.close_in_child()
            if not role.keeps_device:
                os.close(self._device.fileno())

        return fork_child(
            process.label,
            lambda channel: role.main(setup, process.shard, channel),
            let_go=let_go,
            identity=self._rights.identity,
            keep=self._rights.upstream if role.keeps_upstream_rights else frozenset(),
        )

    def _fork_helper(self, label: str, main: Callable[[Channel], None], keep: frozenset[int] = frozenset()) -> Child:
        def let_go() -> None:
            self._let_go()
            if self._carrier is not None:
                self._carrier.close_in_child()
            os.close(self._device.fileno())

        return fork_child(label, main, let_go=let_go, identity=self._rights.identity, keep=keep)

    def _fork_probe(self, label: str, main: Callable[[Channel], None]) -> Child:
        """Fork a child whose sockets leave as the workers' do."""
        return self._fork_helper(label, main, self._rights.upstream)

    def _clear(self, process: Process) -> None:
        shared, role = self._setup.shared, process.role
        for shard in (process.shard,) if role.per_shard else range(shared.shards):
            shared.reset(shard, *role.rings)
        block = shared.counters.block(role.block.format(process.shard))
        for gauge in role.gauges:
            block[gauge] = 0

    def _let_go(self) -> None:
        """Close, in a fresh child, every descriptor that is the supervisor's alone."""
        for owner in self._private:
            owner.close_in_child()

    # -- the end --

    def _kill_children(self) -> None:
        """Leave no child behind, whatever ended the loop."""
        for process in self._tree.processes:
            child, process.child = process.child, None
            if child is not None:
                child.kill()
                wait_readable(child.pidfd, 5.0)
                child.reap()
                self._loop.unregister(child.channel.fileno())
                self._loop.unregister(child.pidfd)
                child.close()


def _prefix(mask: str) -> int:
    """Return the prefix length of a dotted mask."""
    return sum(int(part).bit_count() for part in mask.split("."))
