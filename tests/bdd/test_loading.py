"""The scenarios of features/loading.feature."""

from pytest_bdd import scenarios

scenarios("features/loading.feature")
