"""The same training under several strategies, side by side: what it costs, and that it is the same."""
