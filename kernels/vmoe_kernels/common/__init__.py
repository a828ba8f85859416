"""What no op owns."""
