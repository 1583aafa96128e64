"""The asset graph: one module per derived artifact, the batch engine and the Dagster groups."""
