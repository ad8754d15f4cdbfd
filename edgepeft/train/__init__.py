"""Training: data, tasks, and the loop that trains an adapter on the packed backbone."""
