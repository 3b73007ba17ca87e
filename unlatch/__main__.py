"""The command `unlatch`. Each command imports what it needs: multiprocessing's children import this module too."""

import sys


def main() -> int:
    """Run the command that the arguments name; returns its exit code."""
    from unlatch.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
