"""The scenarios of features/tokens.feature."""

from pytest_bdd import scenarios

scenarios("features/tokens.feature")
