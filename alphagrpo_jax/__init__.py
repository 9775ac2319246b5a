"""AlphaGRPO in JAX: reasoning text-to-image reinforcement learning for unified multimodal models."""

__version__ = "0.1.0"
