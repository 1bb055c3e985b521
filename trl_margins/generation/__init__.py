"""Answers of a model to prompts, for preference pairs and benchmarks."""
