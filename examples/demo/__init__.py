"""A job on four simulated TPU hosts saves as it trains, loses a process in the middle of a save, goes on with three."""
