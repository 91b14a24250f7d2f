"""The machine, files, progress, interruption, and the names of devices, dtypes and sizes."""
