"""Artifacts: keyed folders that are whole or absent, with their lineage."""
