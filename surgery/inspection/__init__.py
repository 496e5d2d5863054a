"""What a rewritten model looks like: summaries, generated code, pictures, coverage."""
