"""The scenarios of features/hub.feature."""

from pytest_bdd import scenarios

scenarios("features/hub.feature")
