"""Engine on the machines of a Ray cluster: simulations that are too large for one machine."""
