"""Rules of the slots that exported files have for many adapters."""
