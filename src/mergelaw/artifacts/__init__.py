"""Artifacts: keyed folders, whole or absent, with a lineage that says where they come from."""
