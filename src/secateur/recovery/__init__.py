"""Fine-tuning that keeps the zeros: read `recover` first."""
