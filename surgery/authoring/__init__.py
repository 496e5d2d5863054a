"""The classes for authors of rules: `Rule`, `Site`, `LiveSite`, `Combination`, and rules as data."""
