"""The scenarios of features/health.feature."""

from pytest_bdd import scenarios

scenarios("features/health.feature")
