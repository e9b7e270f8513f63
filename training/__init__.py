"""What one training step leans on: means, non-finite values, optimizer, precision."""
