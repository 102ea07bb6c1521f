"""Functions of params and inputs."""
