"""Versioned schema of the registry and the outcome records."""
