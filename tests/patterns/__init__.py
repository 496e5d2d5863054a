"""Which modules a pattern means."""
