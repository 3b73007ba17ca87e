"""The command `unlatch`. Imports are the commands' own: multiprocessing's children import this module again."""

import sys


def main() -> int:
    """Run a command; its exit code."""
    from unlatch.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
