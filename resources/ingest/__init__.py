"""How media become known: discovery, listings, queues, and the uploads."""
