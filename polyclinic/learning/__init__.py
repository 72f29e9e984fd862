"""Learning at one site: tasks, networks, training and objectives. Independent of federated learning."""
