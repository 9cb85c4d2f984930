"""Placeholder: replaced by the Lightning callbacks."""
