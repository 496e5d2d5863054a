"""Tests of tracing forwards as graphs."""
