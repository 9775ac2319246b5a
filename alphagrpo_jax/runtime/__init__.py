"""Serves the host side: devices, files, errors, commands, tokenizer, images, logs."""
