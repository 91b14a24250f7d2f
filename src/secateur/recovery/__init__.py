"""Fine-tuning that keeps the zeros: read `recover` first. `training` does the steps, `lora` has
what is merged.
"""
