"""How training scales: the work and the traffic of a step on any number of GPUs."""
