"""Client end: weakly and semi-supervised learning."""
