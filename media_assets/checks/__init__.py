"""Expectations about tables, run as asset checks."""
