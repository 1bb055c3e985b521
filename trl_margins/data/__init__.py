"""Finding, checking and making preference data."""
