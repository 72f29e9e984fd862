"""Client end: contrastive and self-supervised learning."""
