"""The options that `ringway run` and `ringway check` share: one for each configuration key, and --config."""

import os
import textwrap
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
import msgspec

from gateway.cli.arguments import with_two_dashes
from gateway.config import Config, load
from gateway.keys import KEYS, Key

CONFIG_VARIABLE: Final = "RINGWAY_CONFIG"

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ConfiguredCommand(click.Command):
    """A command whose options also come in Go's spelling."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite the arguments, then parse them."""
        booleans = {key.flag for key in KEYS if key.boolean}
        valued = {
            name
            for option in self.params
            if isinstance(option, click.Option) and not option.is_flag
            for name in option.opts
            if name not in booleans
        }
        return super().parse_args(ctx, with_two_dashes(args, valued, booleans))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each option over the whole width: key and variable stand unbroken, to be searched and copied."""
        with formatter.section("Options"):
            for parameter in self.get_params(ctx):
                record = parameter.get_help_record(ctx)
                if record is None:
                    continue
                formatter.write(f"  {record[0]}\n")
                help_, separator, origin = record[1].partition("  [")
                width = formatter.width - 6
                lines = textwrap.wrap(help_, width, break_on_hyphens=False, break_long_words=False)
                if separator:
                    lines += textwrap.wrap("[" + origin, width, break_on_hyphens=False, break_long_words=False)
                formatter.write("".join(f"      {line}\n" for line in lines))


def configuration_options(function: _Function) -> _Function:
    """Give a command --config and a flag for every key; its parameter `config_path` and one per key hold raw text."""
    for key in reversed(KEYS):
        function = _option(key)(function)
    return click.option(
        "-c",
        "--config",
        "config_path",
        metavar="FILE",
        help=f"TOML file with any of the keys below.  [env: {CONFIG_VARIABLE}]",
    )(function)


def configuration(config_path: str | None, values: dict[str, Any]) -> Config:
    """Load the configuration that the options describe; raises ConfigError."""
    flags = {key.name: values[key.field] for key in KEYS if values.get(key.field) is not None}
    return load(config_path or os.environ.get(CONFIG_VARIABLE) or None, os.environ, flags)


def _option(key: Key) -> Callable[[_Function], _Function]:
    short = [flag for flag in key.flags if not flag.startswith("--")]
    long = [flag for flag in key.flags if flag.startswith("--")]
    return click.option(
        *short,
        key.flag,
        *long,
        key.field,
        metavar=f"[={key.metavar}]" if key.boolean else key.metavar,
        help=f"{key.help}  [key: {key.name}; env: {key.variable}; default: {default_text(key)}]",
    )


def default_text(key: Key) -> str:
    """Write a key's default as a user would."""
    for field in msgspec.structs.fields(Config):
        if field.name == key.field:
            value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            if isinstance(value, bool):
                return "true" if value else "false"
            if isinstance(value, list):
                return ",".join(value)
            if isinstance(value, float):
                return f"{value:g}"
            return str(value) or "none"
    raise AssertionError(f"key {key.name} has no field")
