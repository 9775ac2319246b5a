"""Scripts that make the small models of the shapes world."""
