"""Processes that train together: the world, how a model is spread, a watchdog."""
