"""A leaderboard in Weights & Biases: what is sent, who sends it, and the command."""
