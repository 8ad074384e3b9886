"""The scenarios of features/disk.feature."""

from pytest_bdd import scenarios

scenarios("features/disk.feature")
