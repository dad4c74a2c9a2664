"""The demo's synthetic domains."""
