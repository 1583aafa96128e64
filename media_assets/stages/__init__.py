"""One file per derived artifact: its stage."""
