"""`make interop`: adapters in the programs that people serve them with, beside the live torch model.

`cases` lists the adapters, `engines` the programs, `bases` the small models. `reference` makes an adapter, writes its
files and computes what the live model says. `programs/` has one script per program, which runs alone in the program's
own environment. `runner` brings both together, and `page` writes docs/reference/engines.md.
"""
