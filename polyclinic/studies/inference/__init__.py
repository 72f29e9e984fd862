"""Use of trained models: predictions of new images, and evaluation of frozen models."""
