"""Tokens to the experts' rows and back."""
