"""Rules and a model become a plan: matches, checks and recordings, before anything is touched."""
