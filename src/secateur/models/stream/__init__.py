"""The blocks of a model in order, each with its calibration inputs."""
