"""Weights in every form that they are kept in, as state dicts of our models."""
