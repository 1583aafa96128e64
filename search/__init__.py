"""Query engine over the index shards and the catalog."""
