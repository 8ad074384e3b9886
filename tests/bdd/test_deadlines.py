"""The scenarios of features/deadlines.feature."""

from pytest_bdd import scenarios

scenarios("features/deadlines.feature")
