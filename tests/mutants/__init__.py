"""Planted faults, one at a time, and the tests that must catch each: README.md."""
