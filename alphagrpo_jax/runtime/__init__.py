"""Host-side services: devices, files, tokenizer, images, logs."""
