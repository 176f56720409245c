"""The image classifier SDT-H: network, and its interfaces for transformers and timm."""
