"""`ringway exec`: one command with all its traffic through the proxy."""

import sys
from typing import Any

import click
import msgspec

from gateway.cli.options import ConfiguredCommand, configuration, configuration_options
from gateway.config import Config, ConfigError
from gateway.keys import KEYS

_COMMAND = "gateway.cli.exec.command"  # key of click's Context.meta


class _CommandAfterOptions(ConfiguredCommand):
    """Leaves what follows the options alone: it is another program's command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Part the arguments at `--`, or else at the first that is neither an option nor an option's value."""
        valued = {"-c", "--config"}.union(*({key.flag, *key.flags} for key in KEYS if not key.boolean))
        options, ctx.meta[_COMMAND] = part(args, valued)
        return super().parse_args(ctx, options)


def part(arguments: list[str], valued: set[str]) -> tuple[list[str], list[str]]:
    """Part arguments into our options and the command; `valued` are the options that take the next argument."""
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            return arguments[:position], arguments[position + 1 :]
        if not argument.startswith("-"):
            break
        # Go's spelling has one dash: -tun-dns.
        position += 2 if argument in valued or "-" + argument in valued else 1
    return arguments[:position], arguments[position:]


@click.command("exec", cls=_CommandAfterOptions, options_metavar="[OPTIONS] -- COMMAND [ARGUMENT]...")
@configuration_options
@click.pass_context
def command(ctx: click.Context, /, config_path: str | None, **values: Any) -> int:
    """Run one command with all its traffic through the proxy.

    The command runs in a network namespace of its own, whose only way out is a TUN device, and with a resolv.conf of
    its own (--tun-dns). Root is not needed where the kernel allows unprivileged user namespaces. The options are those
    of `ringway run`; by default only warnings are logged.

    Exit codes: the command's own, 128 + N when signal N ended it, 126 when it cannot be run, 127 when it is not found;
    1 when the gateway failed, 2 for usage, configuration and missing permission.
    """
    config = configuration(config_path, values)
    argv: list[str] = ctx.meta[_COMMAND]
    if not argv:
        raise ConfigError("exec needs a command: ringway exec -p URL -- COMMAND")
    if not sys.platform.startswith("linux"):
        raise ConfigError("exec needs Linux; `ringway check` and `ringway proxy` work here")
    return enclose(quieter(config), argv)


def quieter(config: Config) -> Config:
    """Log warnings only, since the terminal is the command's; "info" is the default and says nothing of the wish."""
    return msgspec.structs.replace(config, loglevel="warn") if config.loglevel == "info" else config


def enclose(config: Config, argv: list[str]) -> int:
    """Run a command in an enclosure; what keeps it from starting is one line on standard error."""
    from gateway.device import DeviceError, check_name
    from gateway.enclosure import EnclosureError, run_enclosed

    scheme, _, name = config.device.partition("://")
    if scheme != "tun":
        raise ConfigError(f"device {config.device}: exec makes a device of its own, allowed is tun://NAME")
    try:
        check_name(name)
        return run_enclosed(config, argv)
    except DeviceError as error:
        raise ConfigError(str(error)) from error
    except EnclosureError as error:
        print("ringway:", error, file=sys.stderr)
        return error.exit_code
