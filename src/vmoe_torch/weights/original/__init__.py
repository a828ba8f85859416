"""The original's files: read and written."""
