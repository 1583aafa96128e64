"""Sensors: what makes uploads become partitions and partitions become runs."""
