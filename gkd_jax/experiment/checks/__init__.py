"""Checks of an experiment, one module for each subject. `experiment.prepare` calls them."""
