"""Loops over policy functions: writing a text, drawing an image."""
