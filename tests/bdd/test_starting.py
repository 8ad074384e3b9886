"""The scenarios of features/starting.feature."""

from pytest_bdd import scenarios

scenarios("features/starting.feature")
