"""Pictures: of training runs, from what the trainer wrote to the run folder and nothing else; of a set's audit."""
