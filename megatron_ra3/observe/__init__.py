"""What an operator sees of a run: its timeline over all processes, its engines' figures, profiles, and a live view."""
