"""Keys and values before those of an attention: prefixes, their rows, rotary positions."""
