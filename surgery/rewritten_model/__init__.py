"""The rewritten model as a whole: its record, where each verb begins; state dicts by adapter; transformers' hooks."""
