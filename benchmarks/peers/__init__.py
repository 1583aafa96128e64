"""The same models over the same files through the engine, Ray Data and Daft."""
