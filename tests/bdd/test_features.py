"""All scenarios."""

from pytest_bdd import scenarios

scenarios("features")
