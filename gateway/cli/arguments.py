"""Arguments as other programs of this kind take them, rewritten into what click takes.

gotun2socks is written in Go, whose flags have one dash or two (`-tun-device tun0`, `--tun-device=tun0`), booleans that
take a value only after `=` (`-public-only`, `-public-only=true`), and it has no subcommands. Nothing here knows which
values are allowed; an argument that is not understood is passed on for click to name.
"""

from collections.abc import Collection, Iterable
from typing import Final

_TOP_LEVEL: Final = frozenset(("-h", "--help", "-v", "--version"))


def with_subcommand(arguments: list[str], subcommands: Collection[str]) -> list[str]:
    """Put `run` in front of flags that stand without a subcommand; no arguments at all ask for help."""
    if not arguments:
        return ["--help"]
    first = arguments[0]
    if first in ("-help", "-version"):
        return ["-" + first, *arguments[1:]]
    if first in _TOP_LEVEL or first in subcommands or not first.startswith("-"):
        return arguments
    return ["run", *arguments]


def with_two_dashes(arguments: Iterable[str], valued: Collection[str], booleans: Collection[str]) -> list[str]:
    """Rewrite Go's spelling of flags.

    `valued` and `booleans` hold the flags known, with their dashes (`-p`, `--proxy`, `--public-only`). A boolean
    becomes `--name=true`; click takes booleans here as options with a value.
    """
    rewritten: list[str] = []
    waiting = False  # the argument before is a flag whose value comes now, whatever it looks like
    rest = iter(arguments)
    for argument in rest:
        if waiting or argument == "-" or not argument.startswith("-"):
            rewritten.append(argument)
            waiting = False
            continue
        if argument == "--":
            rewritten.append(argument)
            rewritten.extend(rest)
            break
        name, equals, value = argument.partition("=")
        if name in valued and not name.startswith("--"):
            # click would take "-p=x" for the value "=x".
            rewritten.extend((name, value) if equals else (name,))
            waiting = not equals
            continue
        if not name.startswith("--") and len(name) > 2:
            if "-" + name not in valued and "-" + name not in booleans and _has_attached_value(name, valued):
                rewritten.append(argument)
                continue
            name = "-" + name
        if name in booleans:
            rewritten.append(f"{name}={value if equals else 'true'}")
            continue
        rewritten.append(name + equals + value)
        waiting = name in valued and not equals
    return rewritten


def _has_attached_value(name: str, valued: Collection[str]) -> bool:
    """Tell `-c/etc/ringway.toml` from a misspelt long flag: what is attached looks like a path, URL or address."""
    return name[:2] in valued and any(mark in name for mark in "/.:")
