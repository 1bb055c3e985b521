"""How well rewards rank answers."""
