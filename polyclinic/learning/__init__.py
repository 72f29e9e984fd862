"""What is learned at one site: tasks, networks, training and objectives. Nothing here knows of federated learning."""
