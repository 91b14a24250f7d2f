"""Safetensors folders: read, and written beside their final place and renamed."""
