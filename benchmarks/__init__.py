"""Speed of this project beside others that do the same work; each benchmark is one command."""
