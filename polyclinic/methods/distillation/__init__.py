"""Client end: knowledge distillation."""
