"""The version of Unlatch that this process runs."""

from importlib.metadata import version

# Read when the process starts: an upgrade replaces the file that tells it, and removes it for a moment.
VERSION = version("unlatch")
