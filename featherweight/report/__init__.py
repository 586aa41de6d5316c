"""What a compression did, as facts, on the terminal and as one HTML page."""
