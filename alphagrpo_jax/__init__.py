"""AlphaGRPO in JAX: reinforcement learning of unified multimodal models that think, then draw."""

__version__ = "0.1.0"
