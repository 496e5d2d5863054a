"""A forward as a graph: traced on an example, guarded by what it decided on, verified beside the module."""
