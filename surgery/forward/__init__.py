"""A module's own forward, and a rewrite of it as a tape of operations."""
