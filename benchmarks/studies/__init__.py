"""Trainings that answer a question."""
