"""Ringway's processes around the workers: the command line, the supervisor, the reader and the writer."""

from typing import Final

__version__: Final = "0.1.0"
