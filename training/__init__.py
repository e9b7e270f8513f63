"""Parts that one training step uses: means, non-finite values, optimizer, precision."""
