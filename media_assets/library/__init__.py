"""What spans items: catalog, index, near-duplicates, and what is done to many items at once."""
