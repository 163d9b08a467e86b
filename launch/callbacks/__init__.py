"""Observers of a training run, one small stateful file each."""
