"""The blocked CPU path: every stage as matrix products and in-place passes over cache-sized tiles."""
