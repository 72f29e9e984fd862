"""Start weights: files of pretrained networks as data, and how they are matched with a network's tensors."""
