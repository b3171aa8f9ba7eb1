"""Autocast, and training in 8 bits."""
