"""distrec: multimodal recommenders trained at any size."""
