"""The scenarios of features/memory.feature."""

from pytest_bdd import scenarios

scenarios("features/memory.feature")
