"""The harness: from a matrix file to a graph of stage runs, a store, and a ranked table."""
