"""Model registry (models.toml) and one thin adapter per model library."""
