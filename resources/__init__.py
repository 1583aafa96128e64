"""What assets are handed: settings, storage, outcome records, sandboxed decoding and model adapters."""
