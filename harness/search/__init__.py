"""The search: its space, its study and its trials."""
