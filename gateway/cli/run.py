"""`ringway run`: the gateway in the foreground, until TERM or INT."""

import logging
import os
import sys
from typing import Any, Final

import click

from gateway.cli.options import ConfiguredCommand, configuration, configuration_options
from gateway.config import ConfigError

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "silent": logging.CRITICAL + 1,
}


@click.command("run", cls=ConfiguredCommand)
@configuration_options
def command(config_path: str | None, **values: Any) -> int:
    """Run the gateway in the foreground.

    A flag beats its environment variable, that beats the file's key, that beats the default. Times are seconds (90) or
    written 90s, 2m, 1h30m. Flags may have one dash, as in gotun2socks.

    Exit codes: 0 stopped as asked, 1 failed while running, 2 usage or configuration.
    """
    config = configuration(config_path, values)
    if not sys.platform.startswith("linux"):
        raise ConfigError("run needs Linux; `ringway check` and `ringway proxy` work here")
    start_logging(config.loglevel)
    raise_descriptor_limit()

    from gateway.device import DeviceError
    from gateway.supervisor import Supervisor

    try:
        return Supervisor(config).run()
    except DeviceError as error:
        raise ConfigError(str(error)) from error


def start_logging(loglevel: str) -> None:
    """Send plain lines to standard error; journald has its own clock and gets none."""
    clock = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{clock}%(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[loglevel])
    logging.addLevelName(logging.WARNING, "WARN")
    # Says each netlink message at debug; nobody debugging a gateway wants these.
    logging.getLogger("pyroute2").setLevel(max(logging.WARNING, _LEVELS[loglevel]))


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard one: every flow has a socket."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).warning("cannot raise the limit of open files to %d: %s", hard, error)
