"""Artifacts: keyed folders that are whole or absent, with their lineage.

Keys name an artifact before it is made, the store makes it, its lineage says where it comes from.
"""
