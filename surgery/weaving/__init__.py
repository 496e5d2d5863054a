"""Tapes and a forward become one graph, and the graph the code of a generated class."""
