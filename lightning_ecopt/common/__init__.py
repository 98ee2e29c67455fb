"""Helpers that every other package may use; they know nothing of scaling groups."""
