"""The Dagster face of stages and library: groups, partitions, the mirror, provenance."""
