"""jaxdraft: pretrain, distil, measure and export draft models for speculative decoding, in JAX."""

__version__ = "0.1.0"
