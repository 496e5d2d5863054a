"""The verbs on adapters, alone and in every order."""
