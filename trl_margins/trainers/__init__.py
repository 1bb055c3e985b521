"""TRL's trainers with a weight and a margin per pair."""
