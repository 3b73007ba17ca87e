"""Tests of monitoring, which share a mesh under load. As a package they end it after their last test."""
