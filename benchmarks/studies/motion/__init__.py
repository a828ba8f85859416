"""Moving characters: clips whose class is what a glyph does and which glyph it is, so that no frame alone tells it."""
