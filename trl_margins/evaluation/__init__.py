"""How well rewards rank completions."""
