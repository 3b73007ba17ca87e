"""What the tests of how it is run share."""

from tests.deploy.prometheus import watched

__all__ = ["watched"]
