"""Files of adapters: tensors, JSON, entries, downloads."""
