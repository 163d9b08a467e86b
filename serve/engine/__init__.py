"""Inference: prompts to tokens. Knows neither HTTP nor Ray."""
