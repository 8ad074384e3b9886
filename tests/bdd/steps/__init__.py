"""The steps of the behaviour suite.

Each step function stands under its name here too, so that it can be called without a feature file.
"""
