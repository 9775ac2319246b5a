"""Chat models: the HTTP client, its endpoints and replies, and a local Hugging Face model."""
