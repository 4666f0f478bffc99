"""Text to packed token rows to batches, with numpy and grain; never jax."""
