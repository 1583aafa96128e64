"""What assets are handed: settings, storage, outcome records, sandboxed decoding and model adapters."""

from resources.no_telemetry import switch_off

switch_off()
