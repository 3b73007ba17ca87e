"""Fixtures that tests of deployments share."""

from tests.deploy.prometheus import watched

__all__ = ["watched"]
