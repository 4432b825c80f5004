"""What `ringway` and `python -m gateway` start."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done or stopped as asked, 1 failed, 2 usage or configuration."""
    from gateway.cli import execute

    return execute(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
