"""Golden sets, metrics and model-evaluation assets."""
