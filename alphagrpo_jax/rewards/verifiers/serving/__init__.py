"""Parts of `serve_verifier` behind its routes: requests, batching, replies."""
