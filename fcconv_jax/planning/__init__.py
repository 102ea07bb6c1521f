"""What a layer becomes."""
