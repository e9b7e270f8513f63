"""Tools that look at a trained model: one table, figure or picture a file, each with a command line
of its own."""
