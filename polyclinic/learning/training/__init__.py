"""Training at one site: plain and private optimization, augmentation, random generators."""
