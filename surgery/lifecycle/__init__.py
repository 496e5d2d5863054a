"""The verbs on adapters: apply, remove, activate, attach, rename, copy, combine, simplify, forget."""
