"""Numerical parity with the original libraries."""
