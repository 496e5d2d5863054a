"""Looking at a rewritten model: summaries, code, pictures and coverage."""
