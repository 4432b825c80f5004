"""The command line: one group whose subcommands are imported only when they are called.

`ringway run` stays in memory for months and is forked from; it must not carry rich or a probe's libraries along.
A subcommand NAME is the object `command` of the module `gateway.cli.NAME`.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

from gateway import __version__
from gateway.cli.arguments import with_subcommand
from gateway.proxyurl import ConfigError

USAGE_ERROR: Final = 2

# Name → the line in `ringway --help`, so that help imports no subcommand.
_SUBCOMMANDS: Final = {
    "run": "Run the gateway in the foreground.",
    "exec": "Run one command with all its traffic through the proxy.",
    "proxy": "Run the embedded SOCKS5 proxy.",
    "check": "Check the configuration and probe the proxy.",
    "status": "Show processes, flows, throughput and counters of the running gateway.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        command = importlib.import_module(f"gateway.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUBCOMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_subcommand(args, _SUBCOMMANDS))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _SUBCOMMANDS:
            near = difflib.get_close_matches(args[0], _SUBCOMMANDS, n=1, cutoff=0.0)
            allowed = ", ".join(_SUBCOMMANDS)
            raise click.UsageError(f"no command {args[0]!r}; the nearest one is {near[0]}, allowed are {allowed}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-v", "--version", prog_name="ringway", message="%(prog)s %(version)s")
def cli() -> None:
    """Ringway: a TUN to SOCKS5 gateway.

    Flags without a command mean `ringway run`, as gotun2socks has them: ringway -tun-device tun0 -local-socks-addr …
    """


def execute(arguments: Sequence[str]) -> int:
    """Run the command line on `arguments` (without the program's name); errors are one line on standard error."""
    try:
        outcome = cli.main(list(arguments), prog_name="ringway", standalone_mode=False)
        sys.stdout.flush()
    except ConfigError as error:
        return complain(str(error))
    except click.ClickException as error:
        complain(error.format_message())
        return error.exit_code if error.exit_code > 1 else USAGE_ERROR
    except (click.Abort, KeyboardInterrupt):
        return 130  # 128 + SIGINT, as shells have it
    except BrokenPipeError:
        # `ringway status | head`: nobody reads on, which is no error; Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return outcome if isinstance(outcome, int) else 0


def complain(message: str) -> int:
    """Print one line for the user and return the exit code for usage and configuration."""
    print("ringway:", " ".join(message.split()), file=sys.stderr)
    return USAGE_ERROR
