"""The shapes world: a small, exactly checkable world that trains end to end on a laptop."""
