"""Other programs that run adapters: profiles of what they take, checks, and files for them."""
