"""What a plan finds out before anything is touched."""
