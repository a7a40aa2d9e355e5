"""Checks of an experiment, one module for each thing that is checked; `prepare` calls them."""
