"""Artifacts by their content: actions, records, objects, names, leases, a second store."""
