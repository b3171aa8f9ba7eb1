"""Certificates: what a run was trained on, in formats that others check, signed."""
