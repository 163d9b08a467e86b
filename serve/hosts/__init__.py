"""Processes that an engine and its HTTP application live in."""
