"""The scenarios of features/downloads.feature."""

from pytest_bdd import scenarios

scenarios("features/downloads.feature")
