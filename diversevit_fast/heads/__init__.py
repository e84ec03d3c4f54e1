"""Select attention heads on validation data, and prune the others."""
