"""What the author of a rule meets: `Rule`, `Site`, `LiveSite`, `Combination`, and rules as data."""
