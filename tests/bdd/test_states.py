"""The scenarios of features/states.feature."""

from pytest_bdd import scenarios

scenarios("features/states.feature")
