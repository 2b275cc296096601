"""Output for people: tables, charts and pictures in the terminal, in notebooks and as images."""
