"""Small pictures that let a person see in the Dagster UI what a stage made of an item."""
