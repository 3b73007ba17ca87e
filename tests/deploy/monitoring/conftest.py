"""The mesh that tests of monitoring share."""

from tests.deploy.monitoring.prometheus import watched

__all__ = ["watched"]
