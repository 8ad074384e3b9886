"""The scenarios of features/models.feature."""

from pytest_bdd import scenarios

scenarios("features/models.feature")
