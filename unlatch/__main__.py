"""The command `unlatch`. Each command imports what it needs, and is not held up by what others need."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that the arguments name, and end with its exit code."""
    from unlatch.cli import run
    from unlatch.common.machine.leave import leave

    leave(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
