"""What files say: their formats, read into records of where each tensor lies."""
