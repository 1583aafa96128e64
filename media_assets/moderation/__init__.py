"""From scores to decisions: the taxonomy and the policy."""
