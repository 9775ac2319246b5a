"""The losses of text and image steps, one algorithm per file, as pure functions of arrays."""
