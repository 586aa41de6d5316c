"""Deep-learning model compression on plain PyTorch models."""
