"""Serving a trained model over an OpenAI-compatible HTTP interface."""
