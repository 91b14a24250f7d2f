"""How much is removed from where, and what a run will take."""
