"""The `media-assets` command line: the entry layer above every other package."""
