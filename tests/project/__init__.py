"""The project itself: layers, docs, examples, benchmarks, wheel."""
